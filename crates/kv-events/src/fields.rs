//! The names and places of what an event says. vLLM wrote events as arrays, which end early where all that follows is
//! unset, until 0.23, and writes them as maps since; SGLang writes arrays.

/// The key of a map's tag.
pub(crate) const TAG: &str = "type";
pub(crate) const STORED: &str = "BlockStored";
pub(crate) const REMOVED: &str = "BlockRemoved";
pub(crate) const CLEARED: &str = "AllBlocksCleared";

/// Keys of a batch, in an array's order.
pub(crate) const BATCH: &[&str] = &["ts", "events", "data_parallel_rank"];

/// Keys of [`STORED`] in an array's order, after its tag. The last is in maps only.
pub(crate) const OF_STORED: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
];

/// Keys of [`REMOVED`] in an array's order, after its tag. The last is in maps only.
pub(crate) const OF_REMOVED: &[&str] = &["block_hashes", "medium", "group_idx", "locality"];

/// Caches whose blocks stand for all tokens before them. Those of other kinds, such as sliding windows, say nothing
/// about a prefix by themselves.
pub(crate) const WHOLE_PREFIX: &[&str] = &[
    "full_attention",
    "mla_attention",
    "sink_full_attention",
    "unknown",
];
