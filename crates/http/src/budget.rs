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
pub struct Charge(#[expect(dead_code, reason = "held for its drop")] Account);

/// What one request holds of a [`Budget`], as its body comes in pieces; given back when this is dropped.
#[derive(Debug)]
pub struct Account {
    units: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    /// Bytes not charged yet, less than a unit.
    owed: usize,
}

impl Account {
    /// Charges for `bytes` more.
    ///
    /// # Errors
    /// [`ReadError::Full`]; what was charged before stays charged.
    pub fn charge(&mut self, bytes: usize) -> Result<(), ReadError> {
        let owed = self.owed.saturating_add(bytes);
        if owed >= UNIT {
            let units = u32::try_from(owed / UNIT).unwrap_or(u32::MAX);
            let permit = self.units.clone().try_acquire_many_owned(units);
            let permit = permit.map_err(|_| ReadError::Full)?;
            match &mut self.held {
                Some(held) => held.merge(permit),
                held => *held = Some(permit),
            }
        }
        self.owed = owed % UNIT;
        Ok(())
    }

    /// Gives everything back.
    pub fn release(&mut self) {
        self.held = None;
        self.owed = 0;
    }
}

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

    /// An account of a request that holds nothing yet.
    #[must_use]
    pub fn account(&self) -> Account {
        Account {
            units: self.units.clone(),
            held: None,
            owed: 0,
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
        let mut account = self.account();
        let body = collect_charged(body, limit, |n| account.charge(n)).await?;
        Ok((body, Charge(account)))
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

    #[test]
    fn an_account_pays_for_the_sum_of_its_pieces_and_gives_all_of_it_back() {
        let budget = Budget::new(2 << 10);
        let mut account = budget.account();
        for _ in 0..2 * 1024 / 100 {
            account.charge(100).unwrap();
        }
        let mut other = budget.account();
        assert!(other.charge(1 << 10).is_ok());
        assert!(matches!(account.charge(100), Err(ReadError::Full)));
        account.release();
        assert!(other.charge(1 << 10).is_ok());
    }
}
