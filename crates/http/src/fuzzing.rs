//! For the targets in `/fuzz`: what a client sends before it is a request.

use crate::any_authority::AnyAuthority;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead as _, ReadBuf};

/// What a service reads of a connection on which a client sends `bytes`, `step` of them at a time.
pub fn authorities(bytes: &[u8], step: usize) -> Vec<u8> {
    let mut stream = AnyAuthority::new(bytes);
    let (mut read, mut room) = (Vec::new(), vec![0; step]);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        let mut buf = ReadBuf::new(&mut room);
        let done = Pin::new(&mut stream).poll_read(&mut cx, &mut buf);
        assert!(matches!(done, Poll::Ready(Ok(()))), "bytes are there");
        if buf.filled().is_empty() {
            return read;
        }
        read.extend_from_slice(buf.filled());
    }
}

/// A client's hello in which a name that is none is hidden, and as it is hashed.
pub fn hello(bytes: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut hidden = bytes.to_vec();
    crate::any_name::hide_no_name(&mut hidden);
    let restored = crate::any_name::restored(&hidden).concat();
    (hidden, restored)
}
