//! `config.json` as Hugging Face writes it, old form and new, turned into a [`Config`].
//!
//! Refuses what the graph does not compute (other architectures, activations, rope types) instead of guessing.

use crate::{Config, Rope, RopeScaling};
use serde::Deserialize;

/// No dimension of a model reaches this; keeps products of a file's numbers far from overflow.
const MAX_SIZE: usize = 1 << 24;
const MAX_LAYERS: usize = 1024;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a field of the wrong type.
    #[error("config.json cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// A needed field is absent.
    #[error("config.json lacks {0}")]
    Missing(&'static str),
    /// Something the engine does not compute.
    #[error("{field} {found} is not supported, only {supported}")]
    Unsupported {
        /// Where it stands.
        field: &'static str,
        /// What it says.
        found: String,
        /// What would do.
        supported: &'static str,
    },
    /// Sizes that no model can have.
    #[error("config.json says {field} {found}: expected {expected}")]
    Size {
        /// Where it stands.
        field: &'static str,
        /// What it says.
        found: String,
        /// What would do.
        expected: &'static str,
    },
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    hidden_act: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Deserialize, Default)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
}

impl Config {
    /// Reads a `config.json`. Defaults are those of transformers' `LlamaConfig`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let raw: Raw = serde_json::from_slice(json)?;
        check_family(&raw)?;
        let n_heads = size("num_attention_heads", raw.num_attention_heads)?;
        let hidden_size = size("hidden_size", raw.hidden_size)?;
        let rope = rope(&raw)?;
        let config = Self {
            vocab_size: size("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: size("intermediate_size", raw.intermediate_size)?,
            n_layers: size("num_hidden_layers", raw.num_hidden_layers)?,
            n_heads,
            n_kv_heads: size(
                "num_key_value_heads",
                raw.num_key_value_heads.or(Some(n_heads)),
            )?,
            head_dim: size("head_dim", raw.head_dim.or(Some(hidden_size / n_heads)))?,
            rms_norm_eps: epsilon(raw.rms_norm_eps.unwrap_or(1e-6))?,
            rope,
            max_position_embeddings: size(
                "max_position_embeddings",
                raw.max_position_embeddings.or(Some(2048)),
            )?,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            attention_bias: raw.attention_bias.unwrap_or(false),
            mlp_bias: raw.mlp_bias.unwrap_or(false),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks what no single field shows, whatever kind of file the numbers came from.
    ///
    /// # Errors
    /// [`ConfigError::Size`] for numbers that contradict each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |field, found: usize, expected| {
            Err(ConfigError::Size {
                field,
                found: found.to_string(),
                expected,
            })
        };
        if self.n_kv_heads == 0 || !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return wrong(
                "num_key_value_heads",
                self.n_kv_heads,
                "a divisor of num_attention_heads",
            );
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return wrong("head_dim", self.head_dim, "an even number");
        }
        if !(1..=MAX_LAYERS).contains(&self.n_layers) {
            return wrong("num_hidden_layers", self.n_layers, "1 to 1024");
        }
        match &self.rope.scaling {
            RopeScaling::Factors(f) if f.len() != self.head_dim / 2 => {
                wrong("rope factors", f.len(), "one for each pair of a head")
            }
            _ => Ok(()),
        }
    }
}

fn check_family(raw: &Raw) -> Result<(), ConfigError> {
    const SUPPORTED: &str = "LlamaForCausalLM";
    let named = raw.architectures.as_ref().and_then(|a| a.first());
    let is_llama = match named {
        Some(name) => name == SUPPORTED,
        None => raw.model_type.as_deref() == Some("llama"),
    };
    if !is_llama {
        let found = named
            .or(raw.model_type.as_ref())
            .cloned()
            .unwrap_or_else(|| "none".to_owned());
        return Err(ConfigError::Unsupported {
            field: "architecture",
            found,
            supported: SUPPORTED,
        });
    }
    match raw.hidden_act.as_deref() {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => Err(ConfigError::Unsupported {
            field: "hidden_act",
            found: other.to_owned(),
            supported: "silu",
        }),
    }
}

fn size(field: &'static str, value: Option<usize>) -> Result<usize, ConfigError> {
    match value {
        None => Err(ConfigError::Missing(field)),
        Some(n @ 1..=MAX_SIZE) => Ok(n),
        Some(n) => Err(ConfigError::Size {
            field,
            found: n.to_string(),
            expected: "a number from 1 to 16777216",
        }),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "f32 is what the norm computes in"
)]
fn epsilon(value: f64) -> Result<f32, ConfigError> {
    match value {
        v if v.is_finite() && (0.0..1.0).contains(&v) => Ok(v as f32),
        v => Err(ConfigError::Size {
            field: "rms_norm_eps",
            found: v.to_string(),
            expected: "a number from 0 to 1",
        }),
    }
}

/// transformers 5 keeps everything in `rope_parameters`; before, `rope_theta` stood alone beside `rope_scaling`.
fn rope(raw: &Raw) -> Result<Rope, ConfigError> {
    let none = RawRope::default();
    let old = raw.rope_scaling.as_ref();
    let new = raw.rope_parameters.as_ref();
    let params = new.or(old).unwrap_or(&none);
    let theta = new
        .and_then(|p| p.rope_theta)
        .or(raw.rope_theta)
        .unwrap_or(10_000.0);
    let rotated = params
        .partial_rotary_factor
        .or(raw.partial_rotary_factor)
        .unwrap_or(1.0);
    if rotated != 1.0 {
        return Err(ConfigError::Unsupported {
            field: "partial_rotary_factor",
            found: rotated.to_string(),
            supported: "1",
        });
    }
    let theta = positive("rope_theta", Some(theta))?;
    Ok(Rope {
        theta,
        scaling: scaling(params)?,
    })
}

fn scaling(params: &RawRope) -> Result<RopeScaling, ConfigError> {
    match params.rope_type.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: positive("rope factor", params.factor)?,
        }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: positive("rope factor", params.factor)?,
            low_freq_factor: positive("low_freq_factor", params.low_freq_factor)?,
            high_freq_factor: positive("high_freq_factor", params.high_freq_factor)?,
            original_max_position: size(
                "original_max_position_embeddings",
                params.original_max_position_embeddings,
            )?,
        }),
        Some(other) => Err(ConfigError::Unsupported {
            field: "rope type",
            found: other.to_owned(),
            supported: "default, linear and llama3",
        }),
    }
}

fn positive(field: &'static str, value: Option<f64>) -> Result<f64, ConfigError> {
    match value {
        None => Err(ConfigError::Missing(field)),
        Some(v) if v.is_finite() && v > 0.0 => Ok(v),
        Some(v) => Err(ConfigError::Size {
            field,
            found: v.to_string(),
            expected: "a positive number",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOL: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576,
        "intermediate_size": 1536, "max_position_embeddings": 8192, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_theta": 100000,
        "rope_scaling": null, "tie_word_embeddings": true, "vocab_size": 49152}"#;

    fn with(field: &str) -> Result<Config, ConfigError> {
        Config::from_json(SMOL.replacen('{', &format!("{{{field}, "), 1).as_bytes())
    }

    #[test]
    fn a_smollm2_config_is_read() {
        let c = Config::from_json(SMOL.as_bytes()).unwrap();
        assert_eq!(
            (c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim),
            (30, 9, 3, 64)
        );
        assert_eq!(
            c.rope,
            Rope {
                theta: 100_000.0,
                scaling: RopeScaling::None
            }
        );
        assert!(c.tie_word_embeddings && !c.attention_bias);
    }

    #[test]
    fn both_forms_of_rope_scaling_mean_the_same() {
        let params = r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192"#;
        let old = SMOL.replace(
            r#""rope_scaling": null"#,
            &format!(r#""rope_scaling": {params}}}"#),
        );
        let new = SMOL.replace(r#""rope_theta": 100000,"#, "").replace(
            r#""rope_scaling": null"#,
            &format!(r#""rope_parameters": {params}, "rope_theta": 100000}}"#),
        );
        let old = Config::from_json(old.as_bytes()).unwrap();
        assert_eq!(old, Config::from_json(new.as_bytes()).unwrap());
        assert!(matches!(
            old.rope.scaling,
            RopeScaling::Llama3 { factor: 32.0, .. }
        ));
    }

    #[test]
    fn what_the_graph_does_not_compute_is_refused_by_name() {
        let refused = |json: String| Config::from_json(json.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            refused(SMOL.replace("LlamaForCausalLM", "Qwen3ForCausalLM")),
            "architecture Qwen3ForCausalLM is not supported, only LlamaForCausalLM"
        );
        assert!(refused(SMOL.replace("\"silu\"", "\"gelu\"")).contains("hidden_act gelu"));
        let yarn = r#""rope_scaling": {"type": "yarn", "factor": 4.0}"#;
        assert!(refused(SMOL.replace(r#""rope_scaling": null"#, yarn)).contains("rope type yarn"));
        assert!(with(r#""partial_rotary_factor": 0.5"#).is_err());
    }

    #[test]
    fn contradicting_sizes_are_refused() {
        let refused =
            |from: &str, to: &str| Config::from_json(SMOL.replace(from, to).as_bytes()).is_err();
        assert!(refused(
            "\"num_key_value_heads\": 3",
            "\"num_key_value_heads\": 2"
        ));
        assert!(refused("\"vocab_size\": 49152", "\"vocab_size\": 0"));
        assert!(refused(
            "\"hidden_size\": 576",
            "\"hidden_size\": 9999999999"
        ));
        assert!(with(r#""head_dim": 63"#).is_err());
    }
}
