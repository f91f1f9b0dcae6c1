//! Which tensors are weights of linear layers, told by name and shape: there is no model class to ask.
//!
//! What may go wrong decides what to do in doubt. A linear layer that is left whole costs memory, and loads, because the config lists
//! it as skipped. Any other tensor that is quantized does not load. So what is not known to be linear stays whole.

use std::fmt;

use safetensors::Dtype as Stored;

/// What a tensor is to a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    /// The weight of a linear layer, `[out, in]`.
    Linear,
    /// The same lying down, `[in, out]`: a layer of class `Conv1D` in transformers, which quantizes its transpose.
    Transposed,
    /// Experts of one projection, stacked.
    Stacked,
    /// Anything else.
    Whole(Why),
}

/// Why a tensor is left whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Why {
    /// A vector, a convolution, or anything else that is no matrix.
    NoMatrix,
    /// A matrix that is not called `….weight`: no linear layer has it.
    NoWeight,
    /// Its elements are not fp32, fp16 or bf16.
    Dtype,
    /// An embedding.
    Embedding,
    /// The output layer: a language model's head, or a classifier.
    Head,
    /// A norm.
    Norm,
    /// Chooses experts.
    Router,
    /// A layer that transformers keeps in fp32 or does not quantize.
    Kept,
    /// Stacked experts, which transformers with bitsandbytes does not read quantized.
    StackedExperts,
    /// The caller asked for it.
    Skipped,
    /// It was never quantized.
    NotQuantized,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::NoMatrix => "no matrix",
            Self::NoWeight => "no weight of a linear layer",
            Self::Dtype => "not fp32, fp16 or bf16",
            Self::Embedding => "embedding",
            Self::Head => "output layer",
            Self::Norm => "norm",
            Self::Router => "router",
            Self::Kept => "kept whole by transformers",
            Self::StackedExperts => "stacked experts",
            Self::Skipped => "skipped",
            Self::NotQuantized => "not quantized",
        })
    }
}

/// Output layers, by the name of a module on their path.
pub(super) const HEADS: [&str; 14] = [
    "lm_head",
    "embed_out",
    "score",
    "classifier",
    "qa_outputs",
    "cls",
    "out_lm_head",
    "output_projection",
    "lm_heads",
    "ctc_head",
    "class_labels_classifier",
    "bbox_predictor",
    "seq_relationship",
    "head",
];
/// Output layers of other names, which mostly share their weight with an embedding and are in no file, by model type.
pub(super) const TIED_HEADS: [(&str, &str); 10] = [
    ("albert", "predictions"),
    ("distilbert", "vocab_projector"),
    ("flaubert", "pred_layer"),
    ("modernbert", "decoder"),
    ("modernbert-decoder", "decoder"),
    ("moonshine", "proj_out"),
    ("vilt", "mlm_score"),
    ("whisper", "proj_out"),
    ("xlm", "pred_layer"),
    ("xlnet", "lm_loss"),
];
/// Embeddings, by the last part of their path, beside what has `embed` or `emb` in it.
const EMBEDDINGS: [&str; 9] =
    ["w", "wte", "wpe", "shared", "relative_attention_bias", "tok_embeddings", "token_type", "lookup", "codebook"];
const ROUTERS: [&str; 6] = ["gate", "router", "shared_expert_gate", "gating", "wg", "switch"];
/// Models whose layers `c_*` are of class `Conv1D`.
const CONV1D: [&str; 5] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"];

/// What the tensor `name` is in a model of type `model_type`. `has` tells whether there is a tensor of a name.
pub(super) fn role(name: &str, dtype: Stored, shape: &[usize], model_type: &str, has: impl Fn(&str) -> bool) -> Role {
    if !matches!(dtype, Stored::F32 | Stored::F16 | Stored::BF16) {
        return Role::Whole(Why::Dtype);
    }
    if shape.contains(&0) {
        return Role::Whole(Why::NoMatrix);
    }
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let parts: Vec<&str> = module.split('.').collect();
    if shape.len() == 3 && (parts.contains(&"experts") || name.contains("moe.")) && !parts.contains(&"conv1d") {
        return Role::Stacked;
    }
    if shape.len() != 2 {
        return Role::Whole(Why::NoMatrix);
    }
    if module == name {
        return Role::Whole(Why::NoWeight);
    }
    let before = parts.len().checked_sub(2).map_or("", |i| parts[i]);
    // A number is a place in a list of embeddings, or of layers in a sequence.
    let last = match parts[parts.len() - 1] {
        number if number.bytes().all(|b| b.is_ascii_digit()) => before,
        last => last,
    };
    let lower = last.to_ascii_lowercase();
    if parts.iter().any(|p| HEADS.contains(p)) || last.ends_with("lm_head") || TIED_HEADS.contains(&(model_type, last))
    {
        return Role::Whole(Why::Head);
    }
    let embeds = lower.contains("embed") || lower == "emb" || lower.ends_with("_emb") || lower.starts_with("emb_");
    if embeds || EMBEDDINGS.contains(&last) {
        return Role::Whole(Why::Embedding);
    }
    if lower.contains("norm") || lower.starts_with("ln_") {
        return Role::Whole(Why::Norm);
    }
    if ROUTERS.contains(&last) || before == "router" {
        return Role::Whole(Why::Router);
    }
    if UNREPLACED.contains(&model_type) {
        return Role::Whole(Why::Kept);
    }
    // torch's own attention takes the weight of its output layer without calling the layer.
    let of_attention = || last == "out_proj" && has(&format!("{}in_proj_weight", &module[..module.len() - last.len()]));
    let of_t5 = || last == "wo" && (model_type.contains("t5") || T5_LIKE.contains(&model_type));
    let of_qformer = || parts.contains(&"qformer") && model_type.contains("blip");
    if of_attention() || of_t5() || of_qformer() || last == "weights_proj" {
        return Role::Whole(Why::Kept);
    }
    if CONV1D.contains(&model_type) && (last.starts_with("c_") || last == "q_attn") {
        return Role::Transposed;
    }
    Role::Linear
}

/// Models whose linear layers are of a class of their own, which transformers does not replace.
const UNREPLACED: [&str; 2] = ["falcon", "ibert"];
const T5_LIKE: [&str; 4] = ["udop", "switch_transformers", "pop2piano", "musicgen"];

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, shape: &[usize], model_type: &str) -> Role {
        role(name, Stored::BF16, shape, model_type, |other| other == "a.self_attn.in_proj_weight")
    }

    #[test]
    fn names_and_shapes_tell() {
        let linear = [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.experts.7.down_proj.weight",
            "model.layers.0.block_sparse_moe.experts.3.w1.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "b.self_attn.out_proj.weight",
            "transformer.h.0.attn.c_attn.weight",
        ];
        for name in linear {
            assert_eq!(of(name, &[8, 8], "llama"), Role::Linear, "{name}");
        }
        let whole = [
            ("model.embed_tokens.weight", Why::Embedding),
            ("transformer.wte.weight", Why::Embedding),
            ("shared.weight", Why::Embedding),
            ("lm_head.weight", Why::Head),
            ("lm_head.dense.weight", Why::Head),
            ("audio_lm_head.weight", Why::Head),
            ("decoder.embed_tokens.3.weight", Why::Embedding),
            ("model.layers.0.mlp.gate.weight", Why::Router),
            ("model.layers.0.mlp.shared_expert_gate.weight", Why::Router),
            ("model.layers.0.moe.router.layer.weight", Why::Router),
            ("model.layers.0.self_attn.rel_pos", Why::NoWeight),
            ("a.self_attn.in_proj_weight", Why::NoWeight),
            ("a.self_attn.out_proj.weight", Why::Kept),
        ];
        for (name, why) in whole {
            assert_eq!(of(name, &[8, 8], "llama"), Role::Whole(why), "{name}");
        }
        assert_eq!(of("model.layers.0.mlp.experts.gate_up_proj", &[4, 8, 8], "llama4"), Role::Stacked);
        assert_eq!(of("transformer.h.0.attn.c_attn.weight", &[8, 24], "gpt2"), Role::Transposed);
        assert_eq!(of("encoder.block.0.layer.1.DenseReluDense.wo.weight", &[8, 8], "mt5"), Role::Whole(Why::Kept));
        assert_eq!(of("model.layers.0.self_attn.q_proj.weight", &[8, 0], "llama"), Role::Whole(Why::NoMatrix));
        assert_eq!(of("model.layers.0.self_attn.q_proj.weight", &[8], "llama"), Role::Whole(Why::NoMatrix));
        let eight = role("model.layers.0.mlp.up_proj.weight", Stored::F8_E4M3, &[8, 8], "llama", |_| false);
        assert_eq!(eight, Role::Whole(Why::Dtype));
    }
}
