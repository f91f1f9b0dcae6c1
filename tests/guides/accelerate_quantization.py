"""accelerate's guide to quantization: 8 bits, on a model made empty; saved and loaded. MODEL FOLDER."""

import sys

import halfbyte  # noqa: F401
import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

weights_location, save_directory = sys.argv[1:]
model_config = AutoConfig.from_pretrained(weights_location)


def empty():
    with init_empty_weights():
        empty_model = AutoModelForCausalLM.from_config(model_config)
    empty_model.tie_weights()
    return empty_model


bnb_quantization_config = BnbQuantizationConfig(load_in_8bit=True, llm_int8_threshold=6)
quantized_model = load_and_quantize_model(
    empty(), weights_location=weights_location, bnb_quantization_config=bnb_quantization_config, device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained(weights_location)
prompt = tokenizer("def add(a, b):\n", return_tensors="pt", return_token_type_ids=False).to(quantized_model.device)
text = quantized_model.generate(**prompt, max_new_tokens=16, do_sample=False)
print("written", repr(tokenizer.decode(text[0])))

accelerator = Accelerator()
accelerator.save_model(quantized_model, save_directory)
quantized_model_from_saved = load_and_quantize_model(
    empty(), weights_location=save_directory, bnb_quantization_config=bnb_quantization_config, device_map="auto"
)
print("reloaded", torch.equal(quantized_model_from_saved.generate(**prompt, max_new_tokens=16, do_sample=False), text))

bnb_quantization_config = BnbQuantizationConfig(
    load_in_4bit=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)
quantized_model = load_and_quantize_model(
    empty(), weights_location=weights_location, bnb_quantization_config=bnb_quantization_config, device_map="auto"
)
text = quantized_model.generate(**prompt, max_new_tokens=16, do_sample=False)
print("in_4_bits", repr(tokenizer.decode(text[0])))
