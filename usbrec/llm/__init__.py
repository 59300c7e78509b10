"""A language model from raw weights: decoder, adapters, training, cache and sampling."""
