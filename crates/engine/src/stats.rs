//! What an engine counts.

/// A snapshot of an engine's counters. Gauges are of this moment, the rest only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that take part in steps.
    pub running: u32,
    /// Sequences in the queue.
    pub waiting: u32,
    /// Sequences whose KV is on its way.
    pub awaiting_kv: u32,
    /// Blocks that a sequence refers to.
    pub blocks_used: u32,
    /// Blocks of the pool, scratch not counted.
    pub blocks_total: u32,
    /// Tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Tokens found there.
    pub prefix_hits: u64,
    /// Tokens asked of a peer.
    pub external_queries: u64,
    /// Tokens that came from a peer and were used.
    pub external_hits: u64,
    /// Prompt tokens computed here.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Sequences sent back to the queue for want of blocks.
    pub preemptions: u64,
    /// Steps that ran.
    pub iterations: u64,
    /// Tokens of all steps.
    pub iteration_tokens: u64,
    /// Tokens of the newest step.
    pub last_iteration_tokens: u32,
    /// Sequences that ended by themselves.
    pub finished: u64,
}
