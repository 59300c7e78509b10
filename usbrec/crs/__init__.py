"""Conversational recommendation: data, catalogue, agents, PODCS, SES and evaluation."""
