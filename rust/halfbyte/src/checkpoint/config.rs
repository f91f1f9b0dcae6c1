//! `config.json`: what a conversion reads in it and what it changes. Everything else stays as it was, to the byte.

use std::fmt::{Display, Write as _};

use serde_json::value::RawValue;

use super::header::{Pairs, brief};
use super::{QuantizeOptions, Scheme};
use crate::element::Dtype;
use crate::error::{Error, Result};

pub(super) const NAME: &str = "config.json";
const QUANTIZATION: &str = "quantization_config";
/// The newer and the older key of a model's dtype.
const DTYPES: [&str; 2] = ["dtype", "torch_dtype"];

/// A config: keys and the texts of their values.
pub(super) struct Config {
    entries: Vec<(String, Box<RawValue>)>,
}

impl Config {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let wrong = |e: serde_json::Error| Error::checkpoint(NAME, "a JSON object", brief(&e.to_string()));
        // Python writes NaN and Infinity, which no key of interest has and RawValue does not take.
        let Pairs(entries) = serde_json::from_str(text).map_err(wrong)?;
        Ok(Self { entries })
    }

    fn get<'a, T: serde::Deserialize<'a>>(&'a self, key: &str) -> Option<T> {
        let (_, value) = self.entries.iter().find(|(k, _)| k == key)?;
        serde_json::from_str(value.get()).ok()
    }

    pub(super) fn model_type(&self) -> String {
        self.get("model_type").unwrap_or_default()
    }

    pub(super) fn architectures(&self) -> Vec<String> {
        self.get("architectures").unwrap_or_default()
    }

    /// The method that the checkpoint is quantized with, if it is.
    pub(super) fn quantized(&self) -> Option<String> {
        let quantization: serde_json::Map<String, serde_json::Value> = self.get(QUANTIZATION)?;
        let method = quantization.get("quant_method").and_then(|m| m.as_str());
        Some(method.unwrap_or("an unknown method").to_owned())
    }

    /// The dtype of the model, where it is one that weights are quantized from.
    pub(super) fn dtype(&self) -> Option<Dtype> {
        let name: String = DTYPES.iter().find_map(|key| self.get(key))?;
        Dtype::from_name(&name)
    }

    pub(super) fn set_dtype(&mut self, dtype: Dtype) {
        let value = || RawValue::from_string(format!("\"{}\"", dtype.name())).expect("a name in quotes is JSON");
        let mut found = false;
        for (key, old) in &mut self.entries {
            if DTYPES.contains(&&key[..]) {
                *old = value();
                found = true;
            }
        }
        if !found {
            self.entries.push((DTYPES[0].into(), value()));
        }
    }

    pub(super) fn set_quantization(&mut self, text: Option<String>) {
        self.entries.retain(|(key, _)| key != QUANTIZATION);
        if let Some(text) = text {
            let value = RawValue::from_string(text).expect("what is made here is JSON");
            self.entries.push((QUANTIZATION.into(), value));
        }
    }

    pub(super) fn to_text(&self) -> String {
        let lines: Vec<_> = self
            .entries
            .iter()
            .map(|(key, value)| format!("  {}: {value}", serde_json::Value::from(&key[..])))
            .collect();
        format!("{{\n{}\n}}\n", lines.join(",\n"))
    }
}

/// The `quantization_config`, as transformers writes it. `skipped` are the modules that it shall not make layers of ours of.
pub(super) fn quantization(options: &QuantizeOptions<'_>, compute: Dtype, skipped: Option<&[String]>) -> String {
    let four = match options.scheme {
        Scheme::FourBit(spec) => Some(spec),
        Scheme::Int8 => None,
    };
    let storage = four.and_then(|_| super::storage_name(options.storage)).unwrap_or("uint8");
    let mut text = String::from("{\n");
    let mut add = |key: &str, value: &dyn Display| {
        writeln!(text, "    \"{key}\": {value},").expect("a String takes all");
    };
    add("_load_in_4bit", &four.is_some());
    add("_load_in_8bit", &four.is_none());
    add("bnb_4bit_compute_dtype", &format!("\"{}\"", compute.name()));
    add("bnb_4bit_quant_storage", &format!("\"{storage}\""));
    add("bnb_4bit_quant_type", &format!("\"{}\"", four.map_or("fp4", |spec| spec.kind.name())));
    add("bnb_4bit_use_double_quant", &four.is_some_and(|spec| spec.double_quant));
    add("llm_int8_enable_fp32_cpu_offload", &false);
    add("llm_int8_has_fp16_weight", &false);
    match skipped {
        None => add("llm_int8_skip_modules", &"null"),
        Some(names) => {
            let names: Vec<_> = names.iter().map(|n| format!("      {}", serde_json::Value::from(&n[..]))).collect();
            add("llm_int8_skip_modules", &format!("[\n{}\n    ]", names.join(",\n")));
        }
    }
    add("llm_int8_threshold", &"6.0");
    add("load_in_4bit", &four.is_some());
    add("load_in_8bit", &four.is_none());
    text + "    \"quant_method\": \"bitsandbytes\"\n  }"
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "{\n \"model_type\": \"llama\", \"eps\": 1e-06,\n \"torch_dtype\": \"bfloat16\", \"a\": {\"b\": [1,  2.50]}}";

    #[test]
    fn what_is_not_changed_stays_to_the_byte() {
        let mut config = Config::parse(TEXT).unwrap();
        assert_eq!((config.model_type(), config.dtype()), ("llama".into(), Some(Dtype::Bf16)));
        assert_eq!(config.quantized(), None);
        config.set_dtype(Dtype::F16);
        let options = QuantizeOptions::default();
        config.set_quantization(Some(quantization(&options, Dtype::F16, Some(&["lm_head".into()]))));
        let text = config.to_text();
        for part in ["\"eps\": 1e-06", "\"torch_dtype\": \"float16\"", "{\"b\": [1,  2.50]}", "\"load_in_4bit\": true"]
        {
            assert!(text.contains(part), "{text}");
        }
        let mut again = Config::parse(&text).unwrap();
        assert_eq!(again.quantized().as_deref(), Some("bitsandbytes"));
        again.set_quantization(None);
        assert!(!again.to_text().contains("bitsandbytes"));
        assert!(matches!(Config::parse("[1]"), Err(Error::Checkpoint { .. })));
        assert!(matches!(Config::parse("{\"a\": 1, \"a\": 2}"), Err(Error::Checkpoint { .. })));
    }
}
