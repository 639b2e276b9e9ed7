//! The model's graph run by kernels of our own on the CPU: its runner is an [`baton_engine::Runner`] without plugin
//! and without compilation.

mod sample;
