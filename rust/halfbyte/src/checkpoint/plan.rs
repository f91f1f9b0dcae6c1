//! What a conversion will write, known before a single weight is read: every tensor of every file, and its size.

use safetensors::Dtype as Stored;

use super::config::{Config, NAME as CONFIG};
use super::header::{brief, byte_len};
use super::names::{Role, TIED_HEADS, Why, role};
use super::source::{Source, Tensor};
use super::{DequantizeOptions, QuantizeOptions, Scheme, weight};
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::state::Outline;

/// What is done to a tensor, or to the tensors of a quantized weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// It stays as it is.
    Keep(Why),
    /// It stays whole, in another dtype.
    Cast(Why, Dtype),
    /// It is quantized from this dtype; transposed first where it lies down.
    Quantize {
        /// The dtype to quantize from, and that of the decoded weight.
        dtype: Dtype,
        /// Whether it is stored `[in, out]`.
        transposed: bool,
    },
    /// Its weight is decoded to this dtype; transposed then where it shall lie down.
    Dequantize {
        /// The dtype that is written.
        dtype: Dtype,
        /// Whether it is to be stored `[in, out]`.
        transposed: bool,
        /// Whether it is int8 and not 4-bit.
        int8: bool,
    },
}

/// A step of a conversion: a tensor, or a quantized weight with its statistics.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The name of the tensor, or of the weight.
    pub name: String,
    /// What is done.
    pub action: Action,
    /// The shape of the weight, as it is before quantization.
    pub shape: Vec<usize>,
    /// Bytes read.
    pub bytes: u64,
    pub(super) sources: Vec<Tensor>,
    pub(super) outputs: Vec<Output>,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) dtype: Stored,
    pub(super) shape: Vec<usize>,
    /// Whether it is text, of which only the largest size is known.
    pub(super) text: bool,
}

impl Output {
    /// Bytes it takes, of a text at the most.
    pub(super) fn bytes(&self) -> u64 {
        byte_len(self.dtype, &self.shape).expect("sizes come from tensors that there are")
    }
}

/// Everything that is decided ahead.
pub(super) struct Plan {
    pub(super) items: Vec<Item>,
    /// Of each file the numbers of its items.
    pub(super) shards: Vec<std::ops::Range<usize>>,
    pub(super) config: Option<String>,
}

impl Plan {
    fn new(items: Vec<Item>, shard_size: u64, config: Option<String>) -> Self {
        let mut shards = Vec::new();
        let (mut start, mut size) = (0, 0);
        for (i, item) in items.iter().enumerate() {
            let bytes: u64 = item.outputs.iter().map(Output::bytes).sum();
            if size + bytes > shard_size && i > start {
                shards.push(start..i);
                (start, size) = (i, 0);
            }
            size += bytes;
        }
        shards.push(start..items.len());
        Self { items, shards, config }
    }

    /// The plan of a quantization.
    pub(super) fn quantize(source: &Source, options: &QuantizeOptions<'_>) -> Result<Self> {
        let mut config = source.text(CONFIG)?.map(|text| Config::parse(&text)).transpose()?;
        if let Some(method) = config.as_ref().and_then(Config::quantized) {
            return Err(Error::checkpoint(CONFIG, "a checkpoint that is not quantized", format!("one with {method}")));
        }
        let model_type = config.as_ref().map(Config::model_type).unwrap_or_default();
        let mut items = Vec::new();
        for tensor in source.tensors() {
            if tensor.name.contains(crate::state::JSON_KEY) || tensor.name.rsplit('.').next() == Some("SCB") {
                let expected = "a checkpoint that is not quantized";
                return Err(Error::checkpoint(brief(&tensor.name), expected, "the statistics of a quantized weight"));
            }
            let has = |name: &str| source.get(name).is_some();
            let found = role(&tensor.name, tensor.dtype, &tensor.shape, &model_type, has);
            items.push(to_quantize(tensor, found, options));
        }
        if let Some(config) = &mut config {
            let compute =
                options.compute_dtype.or(options.dtype).unwrap_or_else(|| common_dtype(&items, options.scheme));
            let skipped = skipped_modules(&items, config);
            config.set_quantization(Some(super::config::quantization(options, compute, skipped.as_deref())));
            if let Some(dtype) = options.dtype {
                config.set_dtype(dtype);
            }
        }
        check_names(&items)?;
        Ok(Self::new(items, options.shard_size, config.map(|c| c.to_text())))
    }

    /// The plan of the way back.
    pub(super) fn dequantize(source: &Source, options: &DequantizeOptions) -> Result<Self> {
        let mut config = source.text(CONFIG)?.map(|text| Config::parse(&text)).transpose()?;
        let model_type = config.as_ref().map(Config::model_type).unwrap_or_default();
        let float = config.as_ref().and_then(Config::dtype);
        let mut items = Vec::new();
        let weights = weight::find(source)?;
        for tensor in source.tensors() {
            if weights.is_part(&tensor.name) {
                continue;
            }
            let Some(found) = weights.get(&tensor.name) else {
                items.push(keep(tensor, Why::NotQuantized, options.dtype));
                continue;
            };
            let lies = role(&tensor.name, Stored::F32, &found.shape, &model_type, |_| false) == Role::Transposed;
            let dtype = options.dtype.or(found.dtype).or(float).unwrap_or(Dtype::F16);
            let mut shape = found.shape.clone();
            if lies {
                shape.reverse();
            }
            items.push(Item {
                name: tensor.name.clone(),
                action: Action::Dequantize { dtype, transposed: lies, int8: found.dtype.is_none() },
                outputs: vec![Output { name: tensor.name.clone(), dtype: stored(dtype), shape, text: false }],
                bytes: found.parts.iter().map(|t| t.bytes).sum(),
                shape: found.shape.clone(),
                sources: found.parts.clone(),
            });
        }
        if !items.iter().any(|i| matches!(i.action, Action::Dequantize { .. })) {
            let name = source.stem();
            return Err(Error::checkpoint(name, "a checkpoint with weights that bitsandbytes quantized", "none"));
        }
        if let Some(config) = &mut config {
            config.set_quantization(None);
            if let Some(dtype) = options.dtype {
                config.set_dtype(dtype);
            }
        }
        Ok(Self::new(items, options.shard_size, config.map(|c| c.to_text())))
    }
}

pub(super) fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F32 => Stored::F32,
        Dtype::F16 => Stored::F16,
        Dtype::Bf16 => Stored::BF16,
    }
}

pub(super) fn float(dtype: Stored) -> Option<Dtype> {
    match dtype {
        Stored::F32 => Some(Dtype::F32),
        Stored::F16 => Some(Dtype::F16),
        Stored::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// A tensor that stays whole, in `dtype` if it is a float of another one.
fn keep(tensor: &Tensor, why: Why, dtype: Option<Dtype>) -> Item {
    let cast = dtype.filter(|&to| float(tensor.dtype).is_some_and(|from| from != to));
    let action = cast.map_or(Action::Keep(why), |dtype| Action::Cast(why, dtype));
    let output = Output {
        name: tensor.name.clone(),
        dtype: cast.map_or(tensor.dtype, stored),
        shape: tensor.shape.clone(),
        text: false,
    };
    Item {
        name: tensor.name.clone(),
        action,
        shape: tensor.shape.clone(),
        bytes: tensor.bytes,
        sources: vec![tensor.clone()],
        outputs: vec![output],
    }
}

fn to_quantize(tensor: &Tensor, role: Role, options: &QuantizeOptions<'_>) -> Item {
    let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
    let why = match role {
        Role::Whole(why) => Some(why),
        _ if (options.skip)(module) => Some(Why::Skipped),
        // Rows of int8 have scales by their own; three dimensions are not of that format.
        Role::Stacked if !options.stacked_experts || options.scheme == Scheme::Int8 => Some(Why::StackedExperts),
        _ => None,
    };
    let from = match (why, float(tensor.dtype)) {
        (None, Some(from)) => from,
        (why, _) => return keep(tensor, why.unwrap_or(Why::Dtype), options.dtype),
    };
    let dtype = options.dtype.unwrap_or(from);
    let transposed = role == Role::Transposed;
    let mut shape = tensor.shape.clone();
    if transposed {
        shape.reverse();
    }
    let outputs = match options.scheme {
        Scheme::FourBit(spec) => Outline { spec, storage: options.storage, dtype, shape: &shape }.tensors(),
        Scheme::Int8 => weight::int8_outline(&shape),
    };
    let name = |part: &str| match options.scheme {
        // Those of int8 stand beside `weight`, those of 4 bits below it.
        Scheme::Int8 if !part.is_empty() => format!("{module}.{part}"),
        _ if part.is_empty() => tensor.name.clone(),
        _ => format!("{}.{part}", tensor.name),
    };
    let outputs = outputs
        .into_iter()
        .map(|(part, dtype, shape, text)| Output { name: name(&part), dtype, shape, text })
        .collect();
    Item {
        name: tensor.name.clone(),
        action: Action::Quantize { dtype, transposed },
        shape,
        bytes: tensor.bytes,
        sources: vec![tensor.clone()],
        outputs,
    }
}

/// An error if a statistic would have the name of another tensor.
fn check_names(items: &[Item]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    for output in items.iter().flat_map(|item| &item.outputs) {
        if !seen.insert(&output.name) {
            let got = "a tensor of that name already";
            return Err(Error::checkpoint(brief(&output.name), "a name for the statistics of a weight", got));
        }
    }
    Ok(())
}

/// What bitsandbytes shall compute in: the dtype that most weights come in. For int8 the config has always said float32.
fn common_dtype(items: &[Item], scheme: Scheme) -> Dtype {
    let count = |wanted: Dtype| {
        let quantized = |i: &&Item| matches!(i.action, Action::Quantize { dtype, .. } if dtype == wanted);
        items.iter().filter(quantized).map(|i| i.bytes).sum::<u64>()
    };
    if scheme == Scheme::Int8 {
        return Dtype::F32;
    }
    [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().max_by_key(|&d| count(d)).unwrap_or(Dtype::F32)
}

/// Names that transformers recognizes as embeddings by class: they need not be listed.
const SURE_EMBEDDINGS: [&str; 12] = [
    "embed_tokens",
    "wte",
    "wpe",
    "embed_in",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "shared",
    "relative_attention_bias",
    "embed_positions",
    "tok_embeddings",
    "embeddings",
];

/// The modules that a reader shall leave whole; `None` where those are the ones that transformers leaves whole by itself, which are
/// the output layer and what shares its weight.
fn skipped_modules(items: &[Item], config: &Config) -> Option<Vec<String>> {
    let quantized: Vec<&str> = items
        .iter()
        .filter(|i| matches!(i.action, Action::Quantize { .. }))
        .map(|i| i.name.strip_suffix(".weight").unwrap_or(&i.name))
        .collect();
    let mut names = vec!["lm_head".to_owned()];
    let architectures = config.architectures();
    let mut default = !architectures.is_empty() && architectures.iter().all(|a| a.ends_with("ForCausalLM"));
    let model_type = config.model_type();
    names.extend(TIED_HEADS.iter().filter(|(of, _)| *of == model_type).map(|(_, head)| (*head).to_owned()));
    for item in items {
        let (Action::Keep(why) | Action::Cast(why, _)) = item.action else { continue };
        let Some(module) = item.name.strip_suffix(".weight").filter(|_| item.shape.len() == 2) else { continue };
        let last = module.rsplit('.').next().unwrap_or(module);
        let sure = match why {
            Why::Embedding => SURE_EMBEDDINGS.contains(&last),
            Why::Head => module == "lm_head" || module == "embed_out",
            _ => false,
        };
        default &= sure;
        if !(why == Why::Embedding && sure) {
            names.push(skip_name(module, why, &quantized));
        }
    }
    names.dedup();
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    (!default).then_some(names)
}

/// How the config names a module that stays whole.
fn skip_name(module: &str, why: Why, quantized: &[&str]) -> String {
    let name = short_name(module, why, quantized);
    // transformers before 5.18 takes a name for a regular expression that need not end where the name does; and every version takes
    // it for the end of one.
    if quantized.iter().any(|q| q.starts_with(&name) || q.ends_with(&name)) {
        return format!("{}$", name.replace('.', "\\."));
    }
    name
}

/// The name of a module, or of what it is a part of where that stays whole altogether.
fn short_name(module: &str, why: Why, quantized: &[&str]) -> String {
    let parts: Vec<&str> = module.split('.').collect();
    if why == Why::Head {
        // With all that belongs to it: a part that shares its weight with an embedding is in no file.
        if let Some(at) = parts.iter().position(|p| super::names::HEADS.contains(p)) {
            return parts[..=at].join(".");
        }
    }
    if let Some(at) = parts.iter().position(|&p| p == "experts") {
        // One name for all experts of a layer, if none of them is quantized.
        let experts = parts[..=at].join(".");
        if !quantized.iter().any(|q| q.strip_prefix(&experts[..]).is_some_and(|rest| rest.starts_with('.'))) {
            return experts;
        }
    }
    module.to_owned()
}
