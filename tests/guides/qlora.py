"""The guide "fine-tune a quantized model with peft": LoRA of rank 16 on q and v, with Trainer."""

import json
import sys

import halfbyte  # noqa: F401  # in place of installing bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

name, folder = sys.argv[1:]


def load():
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=torch.bfloat16)


tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.eos_token
with open(f"{name}/heldout.json") as file:
    texts = json.load(file)[:4]
data = [tokenizer(text, truncation=True, max_length=64, return_token_type_ids=False) for text in texts]

model = prepare_model_for_kbit_training(load())
config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
trainer = Trainer(
    model=model,
    train_dataset=data,
    args=TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=12,
        learning_rate=5e-3,
        optim="paged_adamw_8bit",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses", losses[0], losses[-1])

model.save_pretrained(f"{folder}/adapter")
ids = torch.tensor([data[0]["input_ids"]]).to(model.device)
again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load()), f"{folder}/adapter")
with torch.no_grad():
    model.eval()
    distance = (again.eval()(input_ids=ids).logits - model(input_ids=ids).logits).abs().max().item()
print("reloaded", distance)
print("merged", type(again.merge_and_unload()).__name__)
