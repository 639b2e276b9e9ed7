//! What the pickers of a fleet share, and what follows from it: proofs, and the key of the hashes that they exchange.

use crate::wire::Hello;
use hmac::{Hmac, Mac as _};
use sha2::Sha256;
use std::fmt;

/// Shortest secret that is taken, in bytes.
pub const MIN_SECRET_LEN: usize = 32;

/// What all pickers of a fleet know and nobody else. Nothing shows it.
#[derive(Clone)]
pub struct Secret(Hmac<Sha256>);

/// A secret that could be guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret of {0} bytes is too short, it takes {MIN_SECRET_LEN}")]
pub struct SecretError(pub usize);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// Which end of a connection proves itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// It connected, and tells.
    Teller,
    /// It listened, and hears.
    Hearer,
}

/// What both ends said, and what tells their connection from every other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transcript {
    pub(crate) teller: Hello,
    pub(crate) hearer: Hello,
    pub(crate) binding: [u8; 32],
}

impl Secret {
    /// # Errors
    /// [`SecretError`], if it has less than [`MIN_SECRET_LEN`] bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, SecretError> {
        match Hmac::new_from_slice(bytes) {
            Ok(key) if bytes.len() >= MIN_SECRET_LEN => Ok(Self(key)),
            _ => Err(SecretError(bytes.len())),
        }
    }

    /// The key of hashes of prompts: the same wherever the secret is known.
    #[must_use]
    pub fn hash_key(&self) -> u64 {
        let mut mac = self.0.clone();
        mac.update(b"baton peers 1 hashes");
        let bytes: [u8; 32] = mac.finalize().into_bytes().into();
        bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
    }

    pub(crate) fn proof(&self, of: End, transcript: &Transcript) -> [u8; 32] {
        self.mac(of, transcript).finalize().into_bytes().into()
    }

    /// Whether `proof` is that of this end; takes as long for every wrong one.
    pub(crate) fn is_proof(&self, of: End, transcript: &Transcript, proof: &[u8; 32]) -> bool {
        self.mac(of, transcript).verify_slice(proof).is_ok()
    }

    fn mac(&self, of: End, transcript: &Transcript) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(match of {
            End::Teller => b"baton peers 1 teller",
            End::Hearer => b"baton peers 1 hearer",
        });
        mac.update(&transcript.teller.bytes());
        mac.update(&transcript.hearer.bytes());
        mac.update(&transcript.binding);
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: u64) -> Hello {
        Hello {
            instance,
            block_bytes: 64,
            nonce: [3; 16],
        }
    }

    #[test]
    fn a_proof_holds_for_one_end_of_one_connection() {
        let secret = Secret::new(&[1; 32]).unwrap();
        let transcript = Transcript {
            teller: hello(1),
            hearer: hello(2),
            binding: [9; 32],
        };
        let proof = secret.proof(End::Teller, &transcript);
        assert!(secret.is_proof(End::Teller, &transcript, &proof));
        assert!(!secret.is_proof(End::Hearer, &transcript, &proof));
        let (diverted, reflected) = (
            Transcript {
                binding: [8; 32],
                ..transcript
            },
            Transcript {
                teller: hello(2),
                hearer: hello(1),
                ..transcript
            },
        );
        for other in [diverted, reflected] {
            assert!(!secret.is_proof(End::Teller, &other, &proof));
        }
        let other = Secret::new(&[2; 32]).unwrap();
        assert!(!other.is_proof(End::Teller, &transcript, &proof));
        assert_ne!(other.hash_key(), secret.hash_key());
    }

    #[test]
    fn a_short_secret_is_refused_and_none_is_shown() {
        assert_eq!(Secret::new(&[1; 31]).unwrap_err(), SecretError(31));
        assert_eq!(format!("{:?}", Secret::new(&[1; 32])), "Ok(Secret(***))");
    }
}
