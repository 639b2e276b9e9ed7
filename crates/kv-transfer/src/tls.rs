//! TLS 1.3 on a connection. It encrypts; who the other end is, it does not know: certificates are made up and nobody looks at
//! them. The proofs of the handshake cover the [`Binding`] of their connection, and only the two ends of one and the same
//! TLS connection see the same.
//!
//! The lock around the connection's state is never held while bytes come or go, so that one thread can wait for the peer
//! and another write to it. Not here: who writes first (`net`).

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, Error, InvalidMessage,
    ServerConfig, ServerConnection, SignatureScheme,
};

use crate::net::{read_once, remaining};
use crate::secret::Binding;

/// Bytes, the handshake's included, that are read from a peer before it has proved that it belongs to the pool.
pub(crate) const MAX_BEFORE_AUTH: usize = 32 << 10;
/// Ciphertext that is read at once.
const READ_BYTES: usize = 64 << 10;
/// RFC 9266.
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
/// Certificates have to name somebody.
const NAME: &str = "baton";

/// How a producer answers, with a certificate of its own.
///
/// # Errors
/// When the system has no random numbers.
pub(crate) fn producer() -> io::Result<Arc<ServerConfig>> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).map_err(io::Error::other)?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .map_err(io::Error::other)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// How a consumer calls.
///
/// # Errors
/// Never, with what this crate is built from.
pub(crate) fn consumer() -> io::Result<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider())))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// The beginning of a connection at the producer's end.
pub(crate) fn accepted(config: &Arc<ServerConfig>) -> io::Result<Connection> {
    let conn = ServerConnection::new(Arc::clone(config)).map_err(invalid)?;
    Ok(conn.into())
}

/// The beginning of a connection at the consumer's end.
pub(crate) fn called(config: &Arc<ClientConfig>) -> io::Result<Connection> {
    let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
    let conn = ClientConnection::new(Arc::clone(config), name).map_err(invalid)?;
    Ok(conn.into())
}

/// The cheapest cipher first; the consumer's order counts.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

/// Takes any certificate, signed by its key or not: a man in the middle could show a good one of his own just as well.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What went wrong with TLS, if that is what `error` is about.
pub(crate) fn cause(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// Whether the peer speaks, but not TLS.
pub(crate) fn is_plain(error: &Error) -> bool {
    *error == Error::InvalidMessage(InvalidMessage::InvalidContentType)
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// A connection after TLS's handshake.
#[derive(Debug)]
pub(crate) struct Tls {
    conn: Mutex<Connection>,
    /// Held by the one who reads.
    incoming: Mutex<Incoming>,
    binding: Binding,
}

/// What has come and is still to be decrypted.
#[derive(Debug)]
struct Incoming {
    bytes: Vec<u8>,
    unread: Range<usize>,
    /// Bytes that may still come.
    allowance: usize,
}

impl Tls {
    /// Agrees with the peer on keys before `deadline`.
    pub(crate) fn agree(
        tcp: &TcpStream,
        mut conn: Connection,
        deadline: Instant,
    ) -> io::Result<Self> {
        let mut incoming = Incoming {
            bytes: vec![0; READ_BYTES],
            unread: 0..0,
            allowance: MAX_BEFORE_AUTH,
        };
        flush(&mut conn, tcp)?;
        while conn.is_handshaking() {
            tcp.set_read_timeout(Some(remaining(deadline)?))?;
            incoming.fill(tcp)?;
            while conn.is_handshaking() && !incoming.unread.is_empty() {
                let fed = incoming.feed(&mut conn);
                // After an error it is the alert, which may be lost.
                let flushed = flush(&mut conn, tcp);
                fed.and(flushed)?;
            }
        }
        let binding = conn.export_keying_material([0; 32], BINDING_LABEL, None);
        Ok(Self {
            binding: binding.map_err(invalid)?,
            conn: Mutex::new(conn),
            incoming: Mutex::new(incoming),
        })
    }

    pub(crate) fn binding(&self) -> Binding {
        self.binding
    }

    /// The peer has proved itself: it may send as much as it likes.
    pub(crate) fn trust(&self) {
        self.incoming.lock().allowance = usize::MAX;
    }

    /// Reads from the system at most once, and decrypts into `buf`: nothing, if no record is whole yet.
    pub(crate) fn read(&self, tcp: &TcpStream, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.incoming.lock();
        let ready = self.decrypt(&mut incoming, buf)?;
        if ready > 0 || buf.is_empty() {
            return Ok(ready);
        }
        incoming.fill(tcp)?;
        self.decrypt(&mut incoming, buf)
    }

    fn decrypt(&self, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<usize> {
        let mut conn = self.conn.lock();
        let mut filled = 0;
        while filled < buf.len() {
            match conn.reader().read(&mut buf[filled..]) {
                // The peer's own goodbye.
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                Err(_) if incoming.unread.is_empty() => break,
                Err(_) => incoming.feed(&mut conn)?,
            }
        }
        Ok(filled)
    }

    /// Encrypts what it takes of `slices` to the end of `sealed`, after what else there is to be written. Returns how much.
    pub(crate) fn seal(&self, slices: &[IoSlice<'_>], sealed: &mut Vec<u8>) -> io::Result<usize> {
        let mut conn = self.conn.lock();
        let n = conn.writer().write_vectored(slices)?;
        while conn.wants_write() {
            conn.write_tls(sealed)?;
        }
        Ok(n)
    }

    /// Whether something has come that nobody has asked for.
    pub(crate) fn has_unread(&self) -> bool {
        let is_empty = self.incoming.lock().unread.is_empty();
        let state = self.conn.lock().process_new_packets();
        !(is_empty && state.is_ok_and(|state| state.plaintext_bytes_to_read() == 0))
    }
}

impl Incoming {
    /// Reads what there is, at least a byte, once everything before it is decrypted.
    fn fill(&mut self, tcp: &TcpStream) -> io::Result<()> {
        let limit = self.bytes.len().min(self.allowance);
        if limit == 0 {
            return Err(invalid(Error::General(format!(
                "more than {MAX_BEFORE_AUTH} bytes without a proof"
            ))));
        }
        let n = read_once(tcp, &mut self.bytes[..limit])?;
        self.unread = 0..n;
        self.allowance -= n;
        Ok(())
    }

    /// Gives TLS some of what has come.
    fn feed(&mut self, conn: &mut Connection) -> io::Result<()> {
        let n = conn.read_tls(&mut &self.bytes[self.unread.clone()])?;
        self.unread.start += n;
        // It takes nothing any more after the peer's goodbye.
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        conn.process_new_packets().map_err(invalid)?;
        Ok(())
    }
}

/// Writes what TLS itself has to say.
fn flush(conn: &mut Connection, mut tcp: &TcpStream) -> io::Result<()> {
    while conn.wants_write() {
        conn.write_tls(&mut tcp)?;
    }
    Ok(())
}
