"""A checkpoint evaluated on its own equals what the run said of it; transformers loads it as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_checkpoint_evaluates_to_what_the_run_measured(many_run, evaluation):
    assert evaluation.returncode == 0, evaluation.output
    result, _ = evaluation.json("summary.json")
    # The same seeds, prompts and weights: the same samples, to the last one.
    assert result["avg"] == many_run.json("summary.json")["eval_last"]["countdown"]
    assert result["low"] <= result["avg"] <= result["high"]
    responses = [row for row in evaluation.lines("responses.jsonl") if row["benchmark"] == "countdown"]
    assert len(responses) == 16 * 4
    assert sum(row["correct"] for row in responses) / len(responses) == pytest.approx(result["avg"])
    assert "avg@4" in evaluation.output and str(result["num_prompts"]) in evaluation.output


def test_a_checkpoint_is_a_hugging_face_folder(many_run):
    folder = many_run.folder / "checkpoints/step_3/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(many_run_model(many_run), dtype=torch.float32)
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    ]
    assert len(changed) == len(before.state_dict())  # AdamW moved every tensor
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "3 5=8:"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def many_run_model(run) -> str:
    text = (run.folder / "config.yaml").read_text()
    return next(line.split(": ", 1)[1] for line in text.splitlines() if line.strip().startswith("path: "))
