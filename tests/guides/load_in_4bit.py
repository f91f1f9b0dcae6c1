"""The guide "load a model in 4 bits": NF4, double quantization, bf16 compute; generate; save; dequantize."""

import sys

import halfbyte  # noqa: F401  # in place of installing bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

name, folder = sys.argv[1:]
quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(
    name, dtype=torch.bfloat16, device_map="auto", quantization_config=quantization_config
)
whole = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
print("footprint", model.get_memory_footprint() / whole.get_memory_footprint())

inputs = tokenizer("def add(a, b):\n", return_tensors="pt", return_token_type_ids=False).to(model.device)
outputs = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print("written", repr(tokenizer.decode(outputs[0], skip_special_tokens=True)))

model.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
same = torch.equal(again.generate(**inputs, max_new_tokens=16, do_sample=False), outputs)
print("reloaded", same)

model = model.dequantize()
print(
    "dequantized", model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] - inputs["input_ids"].shape[1]
)
