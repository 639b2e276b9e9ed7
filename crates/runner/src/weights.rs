//! Weights' way from a file onto the device: several at a time, each held once.

use crate::OpenError;
use crate::compile::pjrt_dtype;
use crate::runner::Loading;
use baton_kv::DType;
use baton_model::{Config, Weight};
use baton_pjrt::{Buffer, Client, Device, HostMemory, Sharing};
use rayon::prelude::*;
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Reads a weight by its Hugging Face name: writes its elements, row-major in the given type, over all of the bytes.
/// Called from several threads at a time.
pub type LoadWeight<'a> =
    &'a (dyn Fn(&str, DType, &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> + Sync);

/// Loads all weights, in the order of [`baton_model::weights`].
pub(crate) fn load(
    source: LoadWeight<'_>,
    config: &Config,
    dtype: DType,
    (client, device): (&Client, &Device),
    progress: &(dyn Fn(Loading<'_>) + Sync),
) -> Result<Vec<Buffer>, OpenError> {
    let list = baton_model::weights(config);
    let total = list.iter().map(|w| bytes(w, dtype)).sum();
    let loaded = AtomicUsize::new(0);
    let upload = |weight: &Weight| {
        // On CPUs the device then uses this memory as it lies; elsewhere it is freed once copied, before the next.
        let mut memory = HostMemory::zeroed(bytes(weight, dtype));
        source(&weight.name, dtype, memory.as_mut()).map_err(|source| OpenError::Weight {
            name: weight.name.clone(),
            source,
        })?;
        let dims: Vec<i64> = weight
            .axes
            .iter()
            .map(|&(_, n)| i64::try_from(n).unwrap_or(i64::MAX))
            .collect();
        let buffer = client.buffer_from_owned(
            memory,
            pjrt_dtype(dtype),
            &dims,
            device,
            Sharing::ZeroCopy,
        )?;
        buffer.ready()?.wait()?;
        let loaded =
            loaded.fetch_add(bytes(weight, dtype), Ordering::Relaxed) + bytes(weight, dtype);
        progress(Loading::Weights { loaded, total });
        Ok(buffer)
    };
    list.par_iter().with_max_len(1).map(upload).collect()
}

fn bytes(weight: &Weight, dtype: DType) -> usize {
    weight.axes.iter().map(|&(_, n)| n).product::<usize>() * dtype.bytes()
}
