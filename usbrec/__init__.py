"""USB-Rec: conversational recommendation with a language model, a simulated user and a search.

`usbrec.llm` is a language model from raw weights and knows nothing of recommendation. `usbrec.crs`
is conversational recommendation and knows nothing of tensors. `train.py` and `infer.py` connect the
two through `usbrec.chat.LanguageModel`.
"""
