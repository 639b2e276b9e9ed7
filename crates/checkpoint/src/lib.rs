//! baton-checkpoint
