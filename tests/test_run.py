"""The model behind a run is what its options say."""

import pytest
from test_merge import whole_model

from usbrec.chat import Message
from usbrec.llm.kernels import has_order
from usbrec.llm.lora import siblings
from usbrec.options import UserError
from usbrec.run import ModelOptions, load_engine

HELLO = [Message("user", "Hello")]


def first_prompt(**options):
    tokenizer = load_engine(ModelOptions(dtype="float32", device="cpu", **options)).tokenizer
    return tokenizer.decode(tokenizer.prompt(HELLO))


def test_an_option_pins_llamas_date_line(tmp_path):
    whole_model("llama3.1", tmp_path)
    assert "Today Date: 26 Jul 2024\n" in first_prompt(model=str(tmp_path))
    other = first_prompt(model=str(tmp_path), chat_date="01 Jan 2030")
    assert "Today Date: 01 Jan 2030\n" in other and "26 Jul" not in other


def test_an_option_names_the_chat_format(tmp_path):
    whole_model("qwen2.5", tmp_path)
    assert "You are Qwen" in first_prompt(model=str(tmp_path))
    assert "You are" not in first_prompt(model=str(tmp_path), chat_format="chatml")
    with pytest.raises(UserError, match="llama2 needs the control token <s>"):
        first_prompt(model=str(tmp_path), chat_format="llama2")


def test_a_second_copy_of_the_weights_is_kept_unless_an_option_says_no(tmp_path):
    whole_model("qwen2.5", tmp_path)
    for wanted in (True, False):
        options = ModelOptions(str(tmp_path), dtype="bfloat16", device="cpu", order_weights=wanted)
        model = load_engine(options).model
        forms = [model.lm_head.ordered, *(layers.ordered for layers in siblings(model))]
        assert len(forms) == 1 + 4 * model.config.num_hidden_layers
        kept = wanted and has_order(model.lm_head.weight)
        assert [form is not None for form in forms] == [kept] * len(forms)
