//! Proving to each other that both sides belong to the pool. Pure: one state machine for each side.
//!
//! ```text
//! consumer                              producer
//!    HELLO ------------------------------->
//!    <------------------ HELLO, CHALLENGE
//!    AUTH (code over all of the above) --->
//!    <----- WELCOME (code under another label, connection token)
//! ```
//! Neither side learns anything that it could use against a third.

use crate::RejectCode;
use crate::secret::{Secret, Transcript};
use crate::wire::{Hello, Message, WireError};
use crate::{TransferError, wire::MAX_CHUNK};

/// A hello of this crate's abilities.
pub(crate) fn hello(boot_id: u64, fingerprint: u64, nonce: [u8; 16], streams: u16) -> Hello {
    Hello {
        boot_id,
        fingerprint,
        nonce,
        max_chunk: MAX_CHUNK as u32,
        streams,
        features: 0,
    }
}

/// The producer's side.
#[derive(Debug)]
pub(crate) struct ProducerHandshake {
    ours: Hello,
    challenge: [u8; 32],
    conn: [u8; 16],
    theirs: Option<Hello>,
}

/// What the producer does after a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Send these and wait for the next message.
    Continue([Message; 2]),
    /// Send this; the consumer belongs to the pool.
    Welcome(Message, Hello),
    /// Say why, and close.
    Refuse(RejectCode),
}

impl ProducerHandshake {
    /// `challenge` and `conn` are fresh random bytes.
    pub(crate) fn new(ours: Hello, challenge: [u8; 32], conn: [u8; 16]) -> Self {
        Self {
            ours,
            challenge,
            conn,
            theirs: None,
        }
    }

    pub(crate) fn on_message(&mut self, secret: &Secret, message: &Message) -> Answer {
        match (self.theirs, message) {
            (None, Message::Hello(theirs)) if theirs.fingerprint != self.ours.fingerprint => {
                Answer::Refuse(RejectCode::Fingerprint)
            }
            (None, Message::Hello(theirs)) => {
                self.theirs = Some(*theirs);
                let challenge = Message::Challenge {
                    nonce: self.challenge,
                };
                Answer::Continue([Message::Hello(self.ours), challenge])
            }
            (Some(consumer), Message::Auth { mac }) => self.verify(secret, consumer, mac),
            _ => Answer::Refuse(RejectCode::Malformed),
        }
    }

    fn verify(&self, secret: &Secret, consumer: Hello, mac: &[u8; 32]) -> Answer {
        let transcript = Transcript {
            consumer,
            producer: self.ours,
            challenge: self.challenge,
        };
        if !secret.is_consumer(&transcript, mac) {
            return Answer::Refuse(RejectCode::Unauthorized);
        }
        let mac = secret.producer_proof(&transcript);
        Answer::Welcome(
            Message::Welcome {
                mac,
                conn: self.conn,
            },
            consumer,
        )
    }
}

/// The consumer's side, from the moment its own hello is sent.
#[derive(Debug)]
pub(crate) enum ConsumerHandshake {
    Greeted { ours: Hello },
    Introduced { ours: Hello, theirs: Hello },
    Proved { transcript: Transcript },
}

/// What the consumer does after a message.
#[derive(Debug)]
pub(crate) enum Step {
    /// Wait for the next message.
    Wait(ConsumerHandshake),
    /// Send this and wait for the next message.
    Reply(Message, ConsumerHandshake),
    /// The producer belongs to the pool, and this token ties data connections to this one.
    Done([u8; 16]),
}

impl ConsumerHandshake {
    pub(crate) fn on_message(
        self,
        secret: &Secret,
        message: Message,
    ) -> Result<Step, TransferError> {
        match (self, message) {
            (_, Message::GoAway { code }) => Err(TransferError::Rejected(code)),
            (Self::Greeted { ours }, Message::Hello(theirs)) => {
                if theirs.fingerprint != ours.fingerprint {
                    return Err(TransferError::Rejected(RejectCode::Fingerprint));
                }
                Ok(Step::Wait(Self::Introduced { ours, theirs }))
            }
            (Self::Introduced { ours, theirs }, Message::Challenge { nonce: challenge }) => {
                let transcript = Transcript {
                    consumer: ours,
                    producer: theirs,
                    challenge,
                };
                let mac = secret.consumer_proof(&transcript);
                Ok(Step::Reply(
                    Message::Auth { mac },
                    Self::Proved { transcript },
                ))
            }
            (Self::Proved { transcript }, Message::Welcome { mac, conn }) => {
                let is_ours = secret.is_producer(&transcript, &mac);
                if is_ours {
                    Ok(Step::Done(conn))
                } else {
                    Err(TransferError::Impostor)
                }
            }
            (_, other) => Err(WireError::Unexpected {
                message: other.name(),
            }
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONN: [u8; 16] = [4; 16];

    fn secret(byte: u8) -> Secret {
        Secret::new(&[byte; 32]).unwrap()
    }

    /// Runs both machines against each other until one says something final.
    fn run(consumer: &Secret, producer: &Secret, fingerprints: [u64; 2]) -> (Answer, Option<Step>) {
        let ours = hello(1, fingerprints[0], [1; 16], 2);
        let mut p = ProducerHandshake::new(hello(2, fingerprints[1], [2; 16], 2), [3; 32], CONN);
        let answer = p.on_message(producer, &Message::Hello(ours));
        let Answer::Continue([hello, challenge]) = answer else {
            return (answer, None);
        };
        let c = ConsumerHandshake::Greeted { ours };
        let Ok(Step::Wait(c)) = c.on_message(consumer, hello) else {
            panic!("hello refused")
        };
        let Ok(Step::Reply(auth, c)) = c.on_message(consumer, challenge) else {
            panic!("challenge refused")
        };
        let answer = p.on_message(producer, &auth);
        let step = match &answer {
            Answer::Welcome(welcome, _) => c.on_message(consumer, welcome.clone()).ok(),
            _ => None,
        };
        (answer, step)
    }

    #[test]
    fn two_sides_with_the_same_secret_and_model_agree() {
        let (answer, step) = run(&secret(1), &secret(1), [5, 5]);
        assert!(matches!(answer, Answer::Welcome(_, theirs) if theirs.boot_id == 1));
        assert!(matches!(step, Some(Step::Done(CONN))));
    }

    #[test]
    fn a_consumer_without_the_secret_is_refused() {
        let (answer, _) = run(&secret(1), &secret(2), [5, 5]);
        assert_eq!(answer, Answer::Refuse(RejectCode::Unauthorized));
    }

    #[test]
    fn another_model_is_refused_before_any_proof() {
        let (answer, _) = run(&secret(1), &secret(1), [5, 6]);
        assert_eq!(answer, Answer::Refuse(RejectCode::Fingerprint));
    }

    #[test]
    fn a_producer_that_cannot_prove_itself_is_an_impostor() {
        let (ours, theirs) = (hello(1, 5, [1; 16], 2), hello(2, 5, [2; 16], 2));
        let transcript = Transcript {
            consumer: ours,
            producer: theirs,
            challenge: [0; 32],
        };
        // The consumer's own proof, reflected, must not do.
        let mac = secret(1).consumer_proof(&transcript);
        let result = ConsumerHandshake::Proved { transcript }
            .on_message(&secret(1), Message::Welcome { mac, conn: CONN });
        assert_eq!(result.unwrap_err(), TransferError::Impostor);
    }

    #[test]
    fn messages_out_of_order_are_refused() {
        let mut p = ProducerHandshake::new(hello(2, 5, [2; 16], 2), [3; 32], CONN);
        let auth = Message::Auth { mac: [0; 32] };
        assert_eq!(
            p.on_message(&secret(1), &auth),
            Answer::Refuse(RejectCode::Malformed)
        );
        let c = ConsumerHandshake::Greeted {
            ours: hello(1, 5, [1; 16], 2),
        };
        let welcome = Message::Welcome {
            mac: [0; 32],
            conn: CONN,
        };
        assert!(matches!(
            c.on_message(&secret(1), welcome),
            Err(TransferError::Protocol(WireError::Unexpected {
                message: "WELCOME"
            }))
        ));
    }
}
