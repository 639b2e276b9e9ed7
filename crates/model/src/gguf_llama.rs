//! What a GGUF file of architecture `llama` says, in the words of Hugging Face: configuration, names, order of rows.

use crate::gguf::{Gguf, GgufError};
use crate::{Config, Rope, RopeScaling};

impl Config {
    /// The configuration in a GGUF file's metadata. `rope_freqs` are the elements of `rope_freqs.weight`, if the file has it.
    pub fn from_gguf(gguf: &Gguf, rope_freqs: Option<Vec<f32>>) -> Result<Self, GgufError> {
        supported(gguf)?;
        let size = |key: &str| -> Result<usize, GgufError> {
            let n = gguf.unsigned(key).ok_or_else(|| missing(key))?;
            usize::try_from(n)
                .ok()
                .filter(|&n| n > 0 && n <= 1 << 24)
                .ok_or_else(|| missing(key))
        };
        let n_heads = size("llama.attention.head_count")?;
        let hidden_size = size("llama.embedding_length")?;
        let head_dim = size("llama.attention.key_length").unwrap_or(hidden_size / n_heads);
        let rotated = size("llama.rope.dimension_count").unwrap_or(head_dim);
        if rotated != head_dim {
            let (key, found) = ("llama.rope.dimension_count", rotated.to_string());
            return Err(GgufError::Unsupported {
                key,
                found,
                supported: "the whole head",
            });
        }
        let embed = gguf
            .tensors
            .get("token_embd.weight")
            .ok_or_else(|| missing("token_embd.weight"))?;
        let has = |name: &str| gguf.tensors.contains_key(name);
        let config = Self {
            vocab_size: embed.shape.first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: size("llama.feed_forward_length")?,
            n_layers: size("llama.block_count")?,
            n_heads,
            n_kv_heads: size("llama.attention.head_count_kv").unwrap_or(n_heads),
            head_dim,
            rms_norm_eps: gguf
                .float("llama.attention.layer_norm_rms_epsilon")
                .unwrap_or(1e-5) as f32,
            rope: Rope {
                theta: gguf.float("llama.rope.freq_base").unwrap_or(10_000.0),
                scaling: scaling(gguf, rope_freqs)?,
            },
            max_position_embeddings: size("llama.context_length")?,
            tie_word_embeddings: !has("output.weight"),
            attention_bias: has("blk.0.attn_q.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
        };
        config
            .validate()
            .map_err(|error| GgufError::Damaged(error.to_string()))?;
        Ok(config)
    }
}

/// Refuses what the graph does not compute.
fn supported(gguf: &Gguf) -> Result<(), GgufError> {
    let architecture = gguf
        .text("general.architecture")
        .ok_or_else(|| missing("general.architecture"))?;
    if architecture != "llama" {
        let found = architecture.to_owned();
        return Err(GgufError::Unsupported {
            key: "general.architecture",
            found,
            supported: "llama",
        });
    }
    if gguf.unsigned("llama.expert_count").is_some_and(|n| n > 0) {
        let found = "of experts".to_owned();
        return Err(GgufError::Unsupported {
            key: "llama.expert_count",
            found,
            supported: "models without experts",
        });
    }
    Ok(())
}

fn scaling(gguf: &Gguf, rope_freqs: Option<Vec<f32>>) -> Result<RopeScaling, GgufError> {
    if let Some(factors) = rope_freqs {
        return Ok(RopeScaling::Factors(factors));
    }
    match gguf.text("llama.rope.scaling.type") {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => {
            let factor = gguf
                .float("llama.rope.scaling.factor")
                .ok_or_else(|| missing("llama.rope.scaling.factor"))?;
            Ok(RopeScaling::Linear { factor })
        }
        Some(other) => {
            let found = other.to_owned();
            Err(GgufError::Unsupported {
                key: "llama.rope.scaling.type",
                found,
                supported: "none and linear",
            })
        }
    }
}

fn missing(key: &str) -> GgufError {
    GgufError::Missing(key.to_owned())
}

/// GGUF's name of a weight that Hugging Face calls `name`.
pub fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// Where a row of a GGUF tensor belongs in Hugging Face's order.
///
/// GGUF's `llama` rotates neighbouring elements of a head, Hugging Face the head's two halves; so the converter wrote the
/// rows of q and k interleaved, and this undoes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As it lies.
    Same,
    /// Two interleaved halves of every `head_dim` rows.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The order of a weight's rows, by Hugging Face's name.
    pub fn of(name: &str, config: &Config) -> Self {
        if name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.") {
            Self::Interleaved {
                head_dim: config.head_dim,
            }
        } else {
            Self::Same
        }
    }

    /// Whether `n_rows` rows can lie in this order: every head is whole. Only then is every [`place`](Self::place) among
    /// them.
    pub fn suits(self, n_rows: usize) -> bool {
        match self {
            Self::Same => true,
            Self::Interleaved { head_dim } => n_rows.is_multiple_of(head_dim),
        }
    }

    /// The place of GGUF's row `row`.
    pub fn place(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::Writer;

    fn header() -> Writer {
        Writer::default()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.embedding_length", 8)
            .u32("llama.feed_forward_length", 16)
            .u32("llama.attention.head_count", 2)
            .u32("llama.attention.head_count_kv", 1)
            .u32("llama.context_length", 64)
            .f32("llama.rope.freq_base", 100_000.0)
            .tensor("token_embd.weight", &[8, 32], 0, 0)
    }

    #[test]
    fn metadata_becomes_a_configuration() {
        let config =
            Config::from_gguf(&Gguf::parse(&header().header(), 1 << 20).unwrap(), None).unwrap();
        assert_eq!(
            (config.vocab_size, config.head_dim, config.n_kv_heads),
            (32, 4, 1)
        );
        assert!(config.tie_word_embeddings && !config.attention_bias);
        assert_eq!(
            config.rope,
            Rope {
                theta: 100_000.0,
                scaling: RopeScaling::None
            }
        );
    }

    #[test]
    fn another_architecture_is_named() {
        let bytes = Writer::default()
            .text("general.architecture", "mamba")
            .header();
        let error = Config::from_gguf(&Gguf::parse(&bytes, 1 << 20).unwrap(), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "GGUF: general.architecture mamba is not supported, only llama"
        );
    }

    #[test]
    fn every_weight_has_a_gguf_name() {
        let config =
            Config::from_gguf(&Gguf::parse(&header().header(), 1 << 20).unwrap(), None).unwrap();
        for weight in crate::weights(&config) {
            assert!(gguf_name(&weight.name).is_some(), "{}", weight.name);
        }
        assert_eq!(
            gguf_name("model.layers.3.mlp.up_proj.weight").as_deref(),
            Some("blk.3.ffn_up.weight")
        );
        assert_eq!(gguf_name("something.else"), None);
    }

    #[test]
    fn interleaved_rows_go_back_to_their_halves() {
        let order = RowOrder::Interleaved { head_dim: 6 };
        let places: Vec<usize> = (0..12).map(|row| order.place(row)).collect();
        assert_eq!(places, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert!(order.suits(12) && !order.suits(8));
    }
}
