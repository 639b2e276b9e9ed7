//! The pool's secret, and what is derived from it: lease tokens, the proofs of a handshake, and the key that the two ends
//! of a control connection share from then on.
//!
//! Nothing here shows the secret: it has no accessor, and its `Debug` prints stars. Each use of the secret has a
//! label of its own, so that what proves one thing can never be replayed to prove another.

use std::fmt;

use baton_kv::{KvLayout, LeaseToken};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::wire::Hello;

/// Shortest secret accepted, in bytes.
pub const MIN_SECRET_LEN: usize = 16;

const LEASE_LABEL: &[u8] = b"kvx1 lease";
const CONSUMER_LABEL: &[u8] = b"kvx1 consumer";
const PRODUCER_LABEL: &[u8] = b"kvx1 producer";
const CONN_LABEL: &[u8] = b"kvx1 connection";
const ATTACH_LABEL: &[u8] = b"kvx1 attach";
const ATTACHED_LABEL: &[u8] = b"kvx1 attached";
const DOOR_LABEL: &[u8] = b"kvx1 door";

/// What tells a connection from every other one as both of its ends see it, and from what either end sees if somebody sits
/// between them: TLS's exporter value, or zeros without TLS.
pub(crate) type Binding = [u8; 32];

/// Without TLS nothing tells a connection from others.
pub(crate) const UNBOUND: Binding = [0; 32];

/// What all servers that may exchange KV share.
#[derive(Clone)]
pub struct Secret(Hmac<Sha256>);

/// A secret that could be guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret of {len} bytes is too short, it takes {MIN_SECRET_LEN}")]
pub struct SecretError {
    /// Bytes that were given.
    pub len: usize,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

impl Secret {
    /// A secret of at least [`MIN_SECRET_LEN`] bytes.
    ///
    /// # Errors
    /// When it is shorter.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        match Hmac::new_from_slice(bytes) {
            Ok(key) if bytes.len() >= MIN_SECRET_LEN => Ok(Self(key)),
            _ => Err(SecretError { len: bytes.len() }),
        }
    }

    fn mac(&self, label: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
        mac(&self.0, label, parts)
    }

    /// What only the two ends of the control connection with this transcript know. It is never sent.
    pub(crate) fn conn_key(&self, transcript: &Transcript) -> ConnKey {
        ConnKey(self.mac(CONN_LABEL, &[&transcript.bytes()]))
    }

    pub(crate) fn lease_token(&self, lease: &LeaseClaim, nonce: [u8; 16]) -> LeaseToken {
        let mac = lease.mac(self, &nonce).finalize().into_bytes();
        let mut token = [0; 32];
        token[..16].copy_from_slice(&nonce);
        token[16..].copy_from_slice(&mac[..16]);
        LeaseToken(token)
    }

    /// Whether `token` was made for `lease`; takes the same time for every wrong one.
    pub(crate) fn grants(&self, lease: &LeaseClaim, token: &LeaseToken) -> bool {
        let (nonce, tag) = token.0.split_at(16);
        lease.mac(self, nonce).verify_truncated_left(tag).is_ok()
    }

    pub(crate) fn consumer_proof(&self, transcript: &Transcript) -> [u8; 32] {
        self.mac(CONSUMER_LABEL, &[&transcript.bytes()])
            .finalize()
            .into_bytes()
            .into()
    }

    pub(crate) fn is_consumer(&self, transcript: &Transcript, proof: &[u8; 32]) -> bool {
        self.mac(CONSUMER_LABEL, &[&transcript.bytes()])
            .verify_slice(proof)
            .is_ok()
    }

    pub(crate) fn producer_proof(&self, transcript: &Transcript) -> [u8; 32] {
        self.mac(PRODUCER_LABEL, &[&transcript.bytes()])
            .finalize()
            .into_bytes()
            .into()
    }

    pub(crate) fn is_producer(&self, transcript: &Transcript, proof: &[u8; 32]) -> bool {
        self.mac(PRODUCER_LABEL, &[&transcript.bytes()])
            .verify_slice(proof)
            .is_ok()
    }
}

fn mac(key: &Hmac<Sha256>, label: &[u8], parts: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = key.clone();
    mac.update(label);
    parts.iter().for_each(|part| mac.update(part));
    mac
}

/// Ties data connections, and looks into shared memory, to a control connection whose ends have proved themselves.
///
/// A proof is worth something only on the connection that it was made for: whoever gets hold of one, as the far end of a
/// connection that he has diverted, can neither use it on another nor answer it.
pub(crate) struct ConnKey(Hmac<Sha256>);

impl fmt::Debug for ConnKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnKey(***)")
    }
}

impl ConnKey {
    /// The consumer's proof on a data connection.
    pub(crate) fn attach_proof(&self, binding: &Binding) -> [u8; 32] {
        self.attach(binding).finalize().into_bytes().into()
    }

    pub(crate) fn is_attach(&self, binding: &Binding, proof: &[u8; 32]) -> bool {
        self.attach(binding).verify_slice(proof).is_ok()
    }

    /// The producer's proof on the data connection that it numbers `stream`.
    pub(crate) fn attached_proof(&self, binding: &Binding, stream: u16) -> [u8; 32] {
        self.attached(binding, stream)
            .finalize()
            .into_bytes()
            .into()
    }

    pub(crate) fn is_attached(&self, binding: &Binding, stream: u16, proof: &[u8; 32]) -> bool {
        self.attached(binding, stream).verify_slice(proof).is_ok()
    }

    /// What opens the door to shared memory.
    pub(crate) fn password(&self) -> [u8; 16] {
        let mac = mac(&self.0, DOOR_LABEL, &[]).finalize().into_bytes();
        std::array::from_fn(|i| mac[i])
    }

    pub(crate) fn is_password(&self, password: &[u8; 16]) -> bool {
        mac(&self.0, DOOR_LABEL, &[])
            .verify_truncated_left(password)
            .is_ok()
    }

    fn attach(&self, binding: &Binding) -> Hmac<Sha256> {
        mac(&self.0, ATTACH_LABEL, &[binding])
    }

    fn attached(&self, binding: &Binding, stream: u16) -> Hmac<Sha256> {
        mac(&self.0, ATTACHED_LABEL, &[binding, &stream.to_le_bytes()])
    }
}

/// What a lease token is bound to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseClaim {
    pub(crate) lease: u64,
    pub(crate) boot_id: u64,
    pub(crate) fingerprint: u64,
}

impl LeaseClaim {
    fn mac(&self, secret: &Secret, nonce: &[u8]) -> Hmac<Sha256> {
        let numbers = [self.lease, self.boot_id, self.fingerprint].map(u64::to_le_bytes);
        secret.mac(LEASE_LABEL, &[numbers.as_flattened(), nonce])
    }
}

/// What both sides of a handshake have said, and where; each proof covers all of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transcript {
    pub(crate) consumer: Hello,
    pub(crate) producer: Hello,
    pub(crate) challenge: [u8; 32],
    pub(crate) binding: Binding,
}

impl Transcript {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(160);
        self.consumer.encode_body(&mut bytes);
        self.producer.encode_body(&mut bytes);
        bytes.extend(self.challenge);
        bytes.extend(self.binding);
        bytes
    }
}

/// Tells apart what must not exchange KV: weights, layers, heads, head size. Block size and element type are
/// compared by name, so that a refusal can say which one differs.
#[must_use]
pub fn fingerprint(layout: &KvLayout) -> u64 {
    let mut hash = Sha256::new_with_prefix(b"kvx1 layout");
    hash.update(layout.model_fingerprint.to_le_bytes());
    for n in [layout.n_layers, layout.n_kv_heads, layout.head_dim] {
        hash.update(n.to_le_bytes());
    }
    let digest: [u8; 32] = hash.finalize().into();
    digest
        .first_chunk()
        .map_or(0, |head| u64::from_le_bytes(*head))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &[u8]) -> Secret {
        Secret::new(text).unwrap()
    }

    #[test]
    fn a_token_grants_its_lease_on_its_boot_and_nothing_else() {
        let ours = secret(b"sixteen bytes...");
        let claim = LeaseClaim {
            lease: 1,
            boot_id: 2,
            fingerprint: 3,
        };
        let token = ours.lease_token(&claim, [9; 16]);
        assert!(ours.grants(&claim, &token));
        assert!(!ours.grants(&LeaseClaim { lease: 2, ..claim }, &token));
        assert!(!ours.grants(
            &LeaseClaim {
                boot_id: 3,
                ..claim
            },
            &token
        ));
        assert!(!ours.grants(
            &LeaseClaim {
                fingerprint: 4,
                ..claim
            },
            &token
        ));
        assert!(!secret(b"another sixteen.").grants(&claim, &token));
        for bit in 0..256 {
            let mut forged = token;
            forged.0[bit / 8] ^= 1 << (bit % 8);
            assert!(!ours.grants(&claim, &forged));
        }
    }

    fn transcript() -> Transcript {
        let hello = Hello {
            boot_id: 1,
            fingerprint: 2,
            nonce: [3; 16],
            max_chunk: 4,
            streams: 5,
            features: 0,
        };
        Transcript {
            consumer: hello,
            producer: hello,
            challenge: [7; 32],
            binding: [8; 32],
        }
    }

    #[test]
    fn the_proof_of_one_side_does_not_pass_for_the_others() {
        let transcript = transcript();
        let ours = secret(b"sixteen bytes...");
        assert!(ours.is_consumer(&transcript, &ours.consumer_proof(&transcript)));
        assert!(ours.is_producer(&transcript, &ours.producer_proof(&transcript)));
        assert!(!ours.is_producer(&transcript, &ours.consumer_proof(&transcript)));
        let (other, elsewhere) = (
            Transcript {
                challenge: [8; 32],
                ..transcript
            },
            Transcript {
                binding: [0; 32],
                ..transcript
            },
        );
        for other in [other, elsewhere] {
            assert!(!ours.is_consumer(&other, &ours.consumer_proof(&transcript)));
            assert!(!ours.is_producer(&other, &ours.producer_proof(&transcript)));
        }
    }

    #[test]
    fn what_proves_a_data_connection_proves_no_other_and_not_its_other_end() {
        let ours = secret(b"sixteen bytes...");
        let key = ours.conn_key(&transcript());
        let others = [
            ours.conn_key(&Transcript {
                binding: [0; 32],
                ..transcript()
            }),
            secret(b"another sixteen.").conn_key(&transcript()),
        ];
        let (here, there) = ([1; 32], [2; 32]);
        let (attach, attached) = (key.attach_proof(&here), key.attached_proof(&here, 3));
        assert!(key.is_attach(&here, &attach) && key.is_attached(&here, 3, &attached));
        assert!(!key.is_attach(&there, &attach) && !key.is_attached(&there, 3, &attached));
        assert!(!key.is_attached(&here, 4, &attached));
        assert!(!key.is_attach(&here, &attached) && !key.is_attached(&here, 3, &attach));
        assert!(key.is_password(&key.password()) && !key.is_password(&[0; 16]));
        for other in others {
            assert!(!other.is_attach(&here, &attach) && !other.is_attached(&here, 3, &attached));
            assert!(!other.is_password(&key.password()));
        }
        assert_eq!(format!("{key:?}"), "ConnKey(***)");
    }

    #[test]
    fn a_short_secret_is_refused_and_none_is_shown() {
        assert_eq!(Secret::new(b"short").unwrap_err(), SecretError { len: 5 });
        assert_eq!(format!("{:?}", secret(b"sixteen bytes...")), "Secret(***)");
    }
}
