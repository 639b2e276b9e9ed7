//! A bound on the bytes of request bodies that a service holds at a time, all requests together.

use crate::body::{BodyError, collect_charged};
use bytes::Bytes;
use http_body::Body;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that one permit stands for.
const UNIT: usize = 1024;

/// Bytes that may be held. Cheap to clone; clones share the bound.
#[derive(Clone, Debug)]
pub struct Budget {
    units: Arc<Semaphore>,
}

/// Part of a [`Budget`] that is in use until this is dropped.
#[derive(Debug)]
pub struct Charge(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Bodies of other requests take all that may be held.
    #[error("too many bytes are held already")]
    Full,
    /// Too long, or it did not come whole.
    #[error(transparent)]
    Body(#[from] BodyError),
}

impl Budget {
    /// A budget of `bytes`, rounded up to whole kibibytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let units = bytes.div_ceil(UNIT).min(Semaphore::MAX_PERMITS);
        Self {
            units: Arc::new(Semaphore::new(units)),
        }
    }

    /// Reads `body`, at most `limit` bytes. It is charged for what came, as it comes.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read<B>(&self, body: B, limit: usize) -> Result<(Bytes, Charge), ReadError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let acquire = |units| {
            let permit = self.units.clone().try_acquire_many_owned(units);
            permit.map_err(|_| ReadError::Full)
        };
        let mut charged = acquire(0)?;
        let mut owed = 0;
        let charge = |n: usize| -> Result<(), ReadError> {
            owed += n;
            charged.merge(acquire(u32::try_from(owed / UNIT).unwrap_or(u32::MAX))?);
            owed %= UNIT;
            Ok(())
        };
        let body = collect_charged(body, limit, charge).await?;
        Ok((body, Charge(charged)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;

    fn body(n: usize) -> Full<Bytes> {
        Full::new(Bytes::from(vec![b'x'; n]))
    }

    #[tokio::test]
    async fn what_is_held_counts_until_it_is_dropped() {
        let budget = Budget::new(10 << 10);
        let (first, charge) = budget.read(body(8 << 10), 1 << 20).await.unwrap();
        assert_eq!(first.len(), 8 << 10);
        let second = budget.read(body(8 << 10), 1 << 20).await;
        assert!(matches!(second, Err(ReadError::Full)));
        drop(charge);
        assert!(budget.read(body(8 << 10), 1 << 20).await.is_ok());
        let long = budget.read(body(8 << 10), 100).await;
        assert!(matches!(
            long,
            Err(ReadError::Body(BodyError::TooLarge { limit: 100 }))
        ));
    }
}
