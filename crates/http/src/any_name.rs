//! Clients may call a server by any name.
//!
//! Envoy calls a service by its cluster's name where it is told no other; Istio's are like `outbound|9002||picker`, which
//! is no DNS name. rustls refuses such a handshake; ours has no certificates to choose from by name, so that it does not
//! matter. rustls 0.24 will have a setting for it (`InvalidSniPolicy`). Until then: a name that is none is renamed on its
//! way in to an extension that TLS ignores, and named right again where the handshake is hashed, as the client hashed it.

use rustls::SupportedCipherSuite::{self, Tls12, Tls13};
use rustls::crypto::hash::{Context, Hash, HashAlgorithm, Output};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::{CipherSuiteCommon, Tls12CipherSuite, Tls13CipherSuite};
use std::io::{self, Cursor};
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncReadExt as _, Chain, Join, join};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// A connection of which the first record was read already.
pub(crate) type Begun = Join<Chain<Cursor<Vec<u8>>, OwnedReadHalf>, OwnedWriteHalf>;

const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// Kind, version and length of a record.
const RECORD_HEAD: usize = 5;
/// Longest record before encryption.
const MAX_RECORD: usize = 1 << 14;
const SERVER_NAME: [u8; 2] = [0, 0];
/// Of the numbers that are nobody's (RFC 8446, 11).
const HIDDEN: [u8; 2] = [0xff, 0x5e];

/// Reads a client's first record, and hides a name that is none.
///
/// # Errors
/// What the system says; the client may have gone.
pub(crate) async fn begin(stream: TcpStream) -> io::Result<Begun> {
    let (mut reading, writing) = stream.into_split();
    let mut record = vec![0; RECORD_HEAD];
    reading.read_exact(&mut record).await?;
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    if record[0] == HANDSHAKE_RECORD && length <= MAX_RECORD {
        record.resize(RECORD_HEAD + length, 0);
        reading.read_exact(&mut record[RECORD_HEAD..]).await?;
        hide_no_name(&mut record[RECORD_HEAD..]);
    }
    Ok(join(Cursor::new(record).chain(reading), writing))
}

pub(crate) fn hide_no_name(hello: &mut [u8]) {
    if let Some(at) = extension(hello, SERVER_NAME)
        && let Some(name) = name(&hello[at + 2..])
        && ServerName::try_from(name).is_err()
        && extension(hello, HIDDEN).is_none()
    {
        hello[at..at + 2].copy_from_slice(&HIDDEN);
    }
}

/// The first name in an extension, from its length on: it holds a list of names, each with a kind.
fn name(extension: &[u8]) -> Option<&[u8]> {
    let length = usize::from(u16_at(extension, 5)?);
    extension.get(7..7 + length)
}

/// Where the extension of a kind begins in a client's hello.
fn extension(hello: &[u8], kind: [u8; 2]) -> Option<usize> {
    if *hello.first()? != CLIENT_HELLO {
        return None;
    }
    // The message's head, the version, the random.
    let mut at = 4 + 2 + 32;
    at += 1 + usize::from(*hello.get(at)?); // session
    at += 2 + usize::from(u16_at(hello, at)?); // cipher suites
    at += 1 + usize::from(*hello.get(at)?); // compressions
    at += 2; // the length of all extensions
    while *hello.get(at..at + 2)? != kind {
        at += 4 + usize::from(u16_at(hello, at + 2)?);
    }
    Some(at)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|two| u16::from_be_bytes(*two))
}

/// ring's cryptography, which hashes a hidden name as what it was.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let make = || {
        let ring = ring::default_provider();
        let cipher_suites = ring.cipher_suites.iter().map(restoring).collect();
        Arc::new(CryptoProvider {
            cipher_suites,
            ..ring
        })
    };
    PROVIDER.get_or_init(make).clone()
}

/// Suites live as long as the process: rustls wants it so, and there are only these.
fn restoring(suite: &SupportedCipherSuite) -> SupportedCipherSuite {
    let common = |common: &CipherSuiteCommon| CipherSuiteCommon {
        suite: common.suite,
        hash_provider: Box::leak(Box::new(Restoring(common.hash_provider))),
        confidentiality_limit: common.confidentiality_limit,
    };
    match suite {
        Tls12(suite) => Tls12(Box::leak(Box::new(Tls12CipherSuite {
            common: common(&suite.common),
            prf_provider: suite.prf_provider,
            kx: suite.kx,
            sign: suite.sign,
            aead_alg: suite.aead_alg,
        }))),
        Tls13(suite) => Tls13(Box::leak(Box::new(Tls13CipherSuite {
            common: common(&suite.common),
            hkdf_provider: suite.hkdf_provider,
            aead_alg: suite.aead_alg,
            quic: suite.quic,
        }))),
    }
}

struct Restoring(&'static dyn Hash);

impl Hash for Restoring {
    fn start(&self) -> Box<dyn Context> {
        Box::new(RestoringContext(self.0.start()))
    }

    fn hash(&self, data: &[u8]) -> Output {
        let mut context = self.start();
        context.update(data);
        context.finish()
    }

    fn output_len(&self) -> usize {
        self.0.output_len()
    }

    fn algorithm(&self) -> HashAlgorithm {
        self.0.algorithm()
    }
}

struct RestoringContext(Box<dyn Context>);

impl Context for RestoringContext {
    fn fork_finish(&self) -> Output {
        self.0.fork_finish()
    }

    fn fork(&self) -> Box<dyn Context> {
        Box::new(Self(self.0.fork()))
    }

    fn finish(self: Box<Self>) -> Output {
        self.0.finish()
    }

    /// rustls gives a hello at once, from its beginning on.
    fn update(&mut self, data: &[u8]) {
        for part in restored(data) {
            self.0.update(part);
        }
    }
}

/// A message as the client sent it, in parts.
pub(crate) fn restored(message: &[u8]) -> [&[u8]; 3] {
    match extension(message, HIDDEN) {
        None => [message, &[], &[]],
        Some(at) => [&message[..at], &SERVER_NAME, &message[at + HIDDEN.len()..]],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hello that names `name`, after another extension.
    fn hello(name: &[u8]) -> Vec<u8> {
        let length = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
        let mut hello = vec![CLIENT_HELLO, 0, 0, 0, 3, 3];
        hello.extend([7; 32]);
        hello.extend([2, 8, 8, 0, 4, 19, 1, 19, 2, 1, 0]);
        hello.extend(length(4 + 1 + 9 + name.len()));
        hello.extend([0, 35, 0, 1, 9]);
        hello.extend(SERVER_NAME);
        hello.extend(length(name.len() + 5));
        hello.extend(length(name.len() + 3));
        hello.push(0);
        hello.extend(length(name.len()));
        hello.extend(name);
        hello
    }

    #[test]
    fn only_what_is_no_name_is_hidden() {
        for (given, hidden) in [
            (&b"picker.llm.svc"[..], false),
            (b"127.0.0.1", false),
            (b"outbound|9002||picker.llm.svc", true),
            (b"\xff", true),
        ] {
            let mut hello = hello(given);
            hide_no_name(&mut hello);
            assert_eq!(extension(&hello, HIDDEN).is_some(), hidden);
            assert_eq!(extension(&hello, SERVER_NAME).is_none(), hidden);
        }
    }

    #[test]
    fn what_is_hidden_is_hashed_as_it_was() {
        let hello = hello(b"a|b");
        let mut hidden = hello.clone();
        hide_no_name(&mut hidden);
        assert_ne!(hidden, hello);
        let suites = [
            provider().cipher_suites.clone(),
            ring::default_provider().cipher_suites,
        ];
        let hash = |suite: &SupportedCipherSuite, bytes: &[u8]| {
            let suite = match suite {
                Tls12(suite) => &suite.common,
                Tls13(suite) => &suite.common,
            };
            suite.hash_provider.hash(bytes).as_ref().to_vec()
        };
        for (ours, theirs) in suites[0].iter().zip(&suites[1]) {
            assert_eq!(hash(ours, &hidden), hash(theirs, &hello));
        }
    }

    #[test]
    fn a_hello_may_be_cut_anywhere() {
        let mut whole = hello(b"a|b");
        for end in 0..whole.len() {
            let mut cut = whole[..end].to_vec();
            hide_no_name(&mut cut);
            assert_eq!(cut, whole[..end]);
        }
        // Lengths that lie.
        for at in 38..whole.len() {
            let was = std::mem::replace(&mut whole[at], 0xff);
            hide_no_name(&mut whole.clone());
            whole[at] = was;
        }
    }
}
