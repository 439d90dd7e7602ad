"""Fine-tunes with transformers' Trainer: `python examples/trainer.py --data texts.jsonl`, one
{"text": ...} a line. Checkpoints hold the adapter alone; `--resume` goes on from the last."""

from __future__ import annotations

import argparse
import json

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import petal_kernels as pk


def main(words: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-steps", type=int, default=100)
    for name in ("--resume", "--compile"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args(words)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.data) as lines:
        rows = [tokenizer(json.loads(line)["text"], truncation=True) for line in lines]
    held_out = max(1, len(rows) // 10)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    print(pk.attach(model, pk.LoraConfig(target_modules="all-linear")).report())
    arguments = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        save_steps=options.save_steps,
        eval_steps=options.save_steps,
        eval_strategy="steps",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=2e-4,
        torch_compile=options.compile,
        load_best_model_at_end=True,
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data, callbacks = (rows[held_out:], rows[:held_out]), [pk.hf.AdapterCheckpoint()]
    trainer = Trainer(model, arguments, collator, *data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()  # pk.attach(model, options.out) loads it
    return trainer


if __name__ == "__main__":
    main()
