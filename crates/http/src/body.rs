//! Reading a whole body, but not more than asked for and not for longer.

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt as _;
use std::time::Duration;

/// How long a peer may be silent in the middle of a body.
const SILENCE: Duration = Duration::from_secs(30);

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is longer than `limit` bytes.
    #[error("body is longer than {limit} bytes")]
    TooLarge {
        /// What the reader was willing to store.
        limit: usize,
    },
    /// The peer sent nothing for half a minute.
    #[error("body stalled")]
    Stalled,
    /// The connection ended or broke in the middle.
    #[error("body broke off")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Reads `body` to its end and returns it in one piece. Trailers are dropped.
///
/// A body somewhat longer than `limit` is read on, unstored, up to twice the limit, because a peer that is still sending
/// would not see the answer that refuses it.
///
/// # Errors
/// See [`BodyError`]. Cancel safe in the sense that dropping the future drops the body.
pub async fn collect<B>(body: B, limit: usize) -> Result<Bytes, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    collect_charged(body, limit, |_| Ok(())).await
}

/// As [`collect`], and `charge`s the length of every piece before it is stored: a budget pays for what came, not for
/// what was announced.
///
/// # Errors
/// A [`BodyError`], or the error with which `charge` refuses a piece.
pub async fn collect_charged<B, E>(
    mut body: B,
    limit: usize,
    mut charge: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, E>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    E: From<BodyError>,
{
    let declared = body.size_hint().lower();
    if declared > limit.saturating_mul(2) as u64 {
        return Err(BodyError::TooLarge { limit }.into());
    }
    let expected = usize::try_from(declared).unwrap_or(limit).min(limit);
    let mut pieces = Pieces::default();
    let mut seen = 0usize;
    while let Some(data) = next_data(&mut body).await? {
        seen = seen.saturating_add(data.len());
        if seen > limit.saturating_mul(2) {
            break;
        }
        if seen > limit {
            pieces = Pieces::default();
        } else {
            charge(data.len())?;
            pieces.push(data, expected);
        }
    }
    if seen > limit {
        Err(BodyError::TooLarge { limit }.into())
    } else {
        Ok(pieces.join())
    }
}

async fn next_data<B>(body: &mut B) -> Result<Option<Bytes>, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    loop {
        match tokio::time::timeout(SILENCE, body.frame()).await {
            Err(_) => return Err(BodyError::Stalled),
            Ok(None) => return Ok(None),
            Ok(Some(Err(e))) => return Err(BodyError::Broken(e.into())),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// A body of one piece, which most are, is handed on without a copy.
#[derive(Default)]
struct Pieces {
    first: Bytes,
    joined: Option<BytesMut>,
}

impl Pieces {
    /// `expected` is the length of the whole, if the peer said so; it never reserves more than one mebibyte at once,
    /// because saying is cheap.
    fn push(&mut self, data: Bytes, expected: usize) {
        if self.first.is_empty() && self.joined.is_none() {
            self.first = data;
            return;
        }
        let first = &mut self.first;
        let joined = self.joined.get_or_insert_with(|| {
            let mut joined = BytesMut::with_capacity(expected.min(1 << 20));
            joined.extend_from_slice(&std::mem::take(first));
            joined
        });
        joined.extend_from_slice(&data);
    }

    fn join(self) -> Bytes {
        self.joined.map_or(self.first, BytesMut::freeze)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::{Frame, SizeHint};
    use http_body_util::Full;
    use std::collections::VecDeque;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// A body in pieces that never says its length.
    struct Chunked(VecDeque<Result<Frame<Bytes>, std::io::Error>>);

    impl Body for Chunked {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Ready(self.0.pop_front())
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::default()
        }
    }

    fn chunks(sizes: &[usize]) -> Chunked {
        Chunked(
            sizes
                .iter()
                .map(|&n| Ok(Frame::data(Bytes::from(vec![b'x'; n]))))
                .collect(),
        )
    }

    #[tokio::test]
    async fn a_body_of_exactly_the_limit_is_read() {
        assert_eq!(
            collect(Full::new(Bytes::from_static(b"0123456789")), 10)
                .await
                .unwrap(),
            "0123456789"
        );
        assert_eq!(collect(chunks(&[4, 4, 2]), 10).await.unwrap().len(), 10);
        assert_eq!(collect(chunks(&[]), 10).await.unwrap().len(), 0);
    }

    #[tokio::test]
    async fn a_longer_body_is_refused_whether_or_not_it_says_so() {
        for body in [chunks(&[4, 4, 3]), chunks(&[100, 100])] {
            assert!(matches!(
                collect(body, 10).await,
                Err(BodyError::TooLarge { limit: 10 })
            ));
        }
        let whole = Full::new(Bytes::from_static(b"0123456789A"));
        assert!(matches!(
            collect(whole, 10).await,
            Err(BodyError::TooLarge { .. })
        ));
    }

    #[tokio::test]
    async fn a_body_is_refused_as_soon_as_a_piece_cannot_be_paid() {
        let mut left = 6usize;
        let mut charge = |n| {
            left = left.checked_sub(n).ok_or(BodyError::Stalled)?;
            Ok(())
        };
        assert!(
            collect_charged(chunks(&[4, 2]), 10, &mut charge)
                .await
                .is_ok()
        );
        assert!(matches!(
            collect_charged(chunks(&[1]), 10, &mut charge).await,
            Err(BodyError::Stalled)
        ));
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_an_error() {
        let mut body = chunks(&[4]);
        body.0
            .push_back(Err(std::io::ErrorKind::ConnectionReset.into()));
        assert!(matches!(collect(body, 10).await, Err(BodyError::Broken(_))));
    }

    #[tokio::test]
    async fn trailers_are_no_data() {
        let mut body = chunks(&[4]);
        body.0
            .push_back(Ok(Frame::trailers(http::HeaderMap::new())));
        assert_eq!(collect(body, 10).await.unwrap(), "xxxx");
    }
}
