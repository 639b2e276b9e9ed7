//! The model's graph run by kernels of our own on the CPU: its runner is an [`baton_engine::Runner`] without plugin
//! and without compilation.

#![deny(unsafe_op_in_unsafe_fn)]

mod matrix;
mod rows;
mod sample;
mod shared;
mod simd;
mod team;
