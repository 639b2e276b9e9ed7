//! What the system watches on every connection for us: a peer that is cut off, or gone without a word, and how much is under
//! way.
//!
//! Reads have deadlines of their own. Bytes that were written do not: they lie in the system's memory as if they had arrived,
//! and a connection with nothing to say looks alive.

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use rustix::net::sockopt;

/// Silence after which the peer is asked whether it is there, time between two such questions, and their number.
const ASK_AFTER: Duration = Duration::from_secs(5);
const ASK_EVERY: Duration = Duration::from_secs(2);
const MAX_ASKED: u32 = 3;
/// What was written may stay unacknowledged so long, on networks that lose packets.
const MIN_PATIENCE: Duration = Duration::from_secs(5);
/// What is written and not acknowledged where the peer is near; Linux takes it twice. The most that is to be had everywhere.
const FEW_BYTES: usize = 208 << 10;

/// Has the connection end when its peer takes nothing for `patience`, or is not there any more.
pub(crate) fn watch_over(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(patience))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, ASK_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, ASK_EVERY)?;
    sockopt::set_tcp_keepcnt(stream, MAX_ASKED)?;
    end_unacknowledged(stream, patience.max(MIN_PATIENCE))
}

/// Keeps little under way. Left alone the system lets megabytes wait until the peer reads, which by then have left the caches
/// of both sides; on a short way nothing is gained by them.
pub(crate) fn keep_few_under_way(stream: &TcpStream) -> io::Result<()> {
    Ok(sockopt::set_socket_send_buffer_size(stream, FEW_BYTES)?)
}

#[cfg(target_os = "linux")]
fn end_unacknowledged(stream: &TcpStream, after: Duration) -> io::Result<()> {
    let ms = u32::try_from(after.as_millis()).unwrap_or(u32::MAX);
    Ok(sockopt::set_tcp_user_timeout(stream, ms)?)
}

/// Elsewhere the questions alone must do.
#[cfg(not(target_os = "linux"))]
fn end_unacknowledged(_: &TcpStream, _: Duration) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_system_watches_for_silence_and_bounds_what_is_not_acknowledged() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for (patience, ms) in [(2, 5000), (7, 7000)] {
            watch_over(&stream, Duration::from_secs(patience)).unwrap();
            assert!(stream.nodelay().unwrap());
            assert!(sockopt::socket_keepalive(&stream).unwrap());
            assert_eq!(sockopt::tcp_keepidle(&stream), Ok(ASK_AFTER));
            assert_eq!(sockopt::tcp_keepintvl(&stream), Ok(ASK_EVERY));
            assert_eq!(sockopt::tcp_keepcnt(&stream), Ok(MAX_ASKED));
            assert_eq!(sockopt::tcp_user_timeout(&stream), Ok(ms));
        }
        keep_few_under_way(&stream).unwrap();
        assert_eq!(sockopt::socket_send_buffer_size(&stream), Ok(2 * FEW_BYTES));
    }
}
