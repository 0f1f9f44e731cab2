"""The model kept in the repository: small, strictly loadable, any text fits, pass rates are spread."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpsrl
from dpsrl.data.countdown import TINY_TASK, generate
from dpsrl.rewards.countdown import score

pytestmark = pytest.mark.process

FOLDER = Path(dpsrl.__file__).parent / "assets" / "tiny"
NUM_ROLLOUTS = 8


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def loaded():
    """(model in fp32, what loading had to say)."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)


def test_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    parts = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert parts | {"tokenizer_config.json", "README.md"} == set(files)
    assert sum(files.values()) <= 4_000_000


def test_loads_strictly_and_in_full(loaded, tokenizer):
    model, said = loaded
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    config = model.config
    assert config.model_type == "qwen3" and config.dtype == torch.float32
    assert config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert config.vocab_size == len(tokenizer) == 256 + 5
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_generation_stops_at_the_tokenizers_eos(loaded, tokenizer):
    settings = loaded[0].generation_config
    assert settings.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == settings.pad_token_id
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 1.0, 0, 1.0)


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=200))
def test_any_text_comes_back_as_it_was(tokenizer, text):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(token_ids) == len(text.encode()) or "<|" in text
    assert tokenizer.decode(token_ids) == text


def test_a_token_is_a_byte(tokenizer):
    text = "  Let $x^2 \\leq \u00bd$,\r\n\tthen \u2211 \U0001f600 </answer> , . 's"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    every_byte = {tokenizer.encode(chr(point))[-1] for point in range(0x800)}
    assert every_byte <= set(range(256)) and len(every_byte) == 128 + 64  # ASCII, then continuation bytes


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "3 5 7=15:"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>3 5 7=15:<|assistant|>"
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert len(token_ids) == len("3 5 7=15:") + 2
    answered = [{"role": "system", "content": "s"}, *messages, {"role": "assistant", "content": "3+5+7"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole == "<|system|>s<|user|>3 5 7=15:<|assistant|>3+5+7<|eos|>"


@pytest.mark.slow
def test_pass_rates_are_spread(loaded, tokenizer):
    """Held-out prompts, seeded: room to select (unsolved, mixed, solved) and room to improve."""
    model = loaded[0].eval()
    rows = generate(256, seed=5, split="test", **TINY_TASK)
    messages = [[{"role": "user", "content": row["problem"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=32, num_return_sequences=NUM_ROLLOUTS)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    correct = [score(text, rows[i // NUM_ROLLOUTS]["answer"]).correct for i, text in enumerate(texts)]
    solved = torch.tensor(correct).view(-1, NUM_ROLLOUTS).sum(1)
    unsolved_share, solved_share = (solved == 0).float().mean(), (solved == NUM_ROLLOUTS).float().mean()
    assert unsolved_share >= 0.20
    assert 1 - unsolved_share - solved_share >= 0.40
    assert solved_share >= 0.03
    assert 0.25 <= solved.sum() / len(correct) <= 0.40
