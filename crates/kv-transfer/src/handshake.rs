//! Proving to each other that both sides belong to the pool. Pure: one state machine for each side.
//!
//! ```text
//! consumer                              producer
//!    HELLO ------------------------------->
//!    <------------------ HELLO, CHALLENGE
//!    AUTH (code over all of the above) --->
//!    <----- WELCOME (code under another label, the session's name)
//!
//!    ATTACH (on a data connection: the session's name, code over this connection) --->
//!    <----------------------------------- ATTACHED (its number, code over both)
//! ```
//! Neither side learns anything that it could use against a third. The codes cover what both sides see of the connection
//! that they come through, so under TLS whoever sits between them, with a connection to each, is found out. From the
//! first handshake both sides derive the key of the second; it is never sent.

use crate::RejectCode;
use crate::secret::{Binding, ConnKey, Secret, Transcript};
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
    session: u64,
    binding: Binding,
    theirs: Option<Hello>,
}

/// What the producer does after a message.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Send these and wait for the next message.
    Continue([Message; 2]),
    /// Send this; the consumer belongs to the pool.
    Welcome(Message, ConnKey),
    /// Say why, and close.
    Refuse(RejectCode),
}

impl ProducerHandshake {
    /// `challenge` is fresh random bytes; `session` is what the connection will be called.
    pub(crate) fn new(ours: Hello, challenge: [u8; 32], session: u64, binding: Binding) -> Self {
        Self {
            ours,
            challenge,
            session,
            binding,
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
            binding: self.binding,
        };
        if !secret.is_consumer(&transcript, mac) {
            return Answer::Refuse(RejectCode::Unauthorized);
        }
        let mac = secret.producer_proof(&transcript);
        let session = self.session;
        Answer::Welcome(
            Message::Welcome { mac, session },
            secret.conn_key(&transcript),
        )
    }
}

/// The consumer's side, from the moment its own hello is sent.
#[derive(Debug)]
pub(crate) enum ConsumerHandshake {
    Greeted {
        ours: Hello,
        binding: Binding,
    },
    Introduced {
        ours: Hello,
        theirs: Hello,
        binding: Binding,
    },
    Proved {
        transcript: Transcript,
    },
}

/// What the consumer does after a message.
#[derive(Debug)]
pub(crate) enum Step {
    /// Wait for the next message.
    Wait(ConsumerHandshake),
    /// Send this and wait for the next message.
    Reply(Message, ConsumerHandshake),
    /// The producer belongs to the pool. It calls the connection so, and this key ties data connections to it.
    Done(u64, ConnKey),
}

impl ConsumerHandshake {
    pub(crate) fn on_message(
        self,
        secret: &Secret,
        message: Message,
    ) -> Result<Step, TransferError> {
        match (self, message) {
            (_, Message::GoAway { code }) => Err(TransferError::Rejected(code)),
            (Self::Greeted { ours, binding }, Message::Hello(theirs)) => {
                if theirs.fingerprint != ours.fingerprint {
                    return Err(TransferError::Rejected(RejectCode::Fingerprint));
                }
                Ok(Step::Wait(Self::Introduced {
                    ours,
                    theirs,
                    binding,
                }))
            }
            (
                Self::Introduced {
                    ours,
                    theirs,
                    binding,
                },
                Message::Challenge { nonce: challenge },
            ) => {
                let transcript = Transcript {
                    consumer: ours,
                    producer: theirs,
                    challenge,
                    binding,
                };
                let mac = secret.consumer_proof(&transcript);
                Ok(Step::Reply(
                    Message::Auth { mac },
                    Self::Proved { transcript },
                ))
            }
            (Self::Proved { transcript }, Message::Welcome { mac, session }) => {
                let is_ours = secret.is_producer(&transcript, &mac);
                if is_ours {
                    Ok(Step::Done(session, secret.conn_key(&transcript)))
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

    const SESSION: u64 = 4;

    fn secret(byte: u8) -> Secret {
        Secret::new(&[byte; 32]).unwrap()
    }

    /// What one side brings.
    struct Side {
        secret: Secret,
        fingerprint: u64,
        binding: Binding,
    }

    fn side(secret_byte: u8) -> Side {
        Side {
            secret: secret(secret_byte),
            fingerprint: 5,
            binding: [6; 32],
        }
    }

    /// Runs both machines against each other until one says something final.
    fn run(consumer: &Side, producer: &Side) -> (Answer, Option<Step>) {
        let ours = hello(1, consumer.fingerprint, [1; 16], 2);
        let theirs = hello(2, producer.fingerprint, [2; 16], 2);
        let mut p = ProducerHandshake::new(theirs, [3; 32], SESSION, producer.binding);
        let binding = consumer.binding;
        let (consumer, producer) = (&consumer.secret, &producer.secret);
        let answer = p.on_message(producer, &Message::Hello(ours));
        let Answer::Continue([hello, challenge]) = answer else {
            return (answer, None);
        };
        let c = ConsumerHandshake::Greeted { ours, binding };
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
        let (answer, step) = run(&side(1), &side(1));
        let (Answer::Welcome(_, theirs), Some(Step::Done(SESSION, ours))) = (answer, step) else {
            panic!("they do not agree")
        };
        assert!(theirs.is_attach(&[7; 32], &ours.attach_proof(&[7; 32])));
    }

    #[test]
    fn a_consumer_without_the_secret_is_refused() {
        let (answer, _) = run(&side(1), &side(2));
        assert!(matches!(answer, Answer::Refuse(RejectCode::Unauthorized)));
    }

    #[test]
    fn two_sides_that_see_different_connections_have_somebody_between_them() {
        for binding in [[7; 32], [0; 32]] {
            let (answer, _) = run(&side(1), &Side { binding, ..side(1) });
            assert!(matches!(answer, Answer::Refuse(RejectCode::Unauthorized)));
        }
    }

    #[test]
    fn another_model_is_refused_before_any_proof() {
        let other = Side {
            fingerprint: 6,
            ..side(1)
        };
        let (answer, _) = run(&side(1), &other);
        assert!(matches!(answer, Answer::Refuse(RejectCode::Fingerprint)));
    }

    #[test]
    fn a_producer_that_cannot_prove_itself_is_an_impostor() {
        let (ours, theirs) = (hello(1, 5, [1; 16], 2), hello(2, 5, [2; 16], 2));
        let transcript = Transcript {
            consumer: ours,
            producer: theirs,
            challenge: [0; 32],
            binding: [0; 32],
        };
        // The consumer's own proof, reflected, must not do.
        let mac = secret(1).consumer_proof(&transcript);
        let result = ConsumerHandshake::Proved { transcript }.on_message(
            &secret(1),
            Message::Welcome {
                mac,
                session: SESSION,
            },
        );
        assert_eq!(result.unwrap_err(), TransferError::Impostor);
    }

    #[test]
    fn messages_out_of_order_are_refused() {
        let mut p = ProducerHandshake::new(hello(2, 5, [2; 16], 2), [3; 32], SESSION, [0; 32]);
        let auth = Message::Auth { mac: [0; 32] };
        let answer = p.on_message(&secret(1), &auth);
        assert!(matches!(answer, Answer::Refuse(RejectCode::Malformed)));
        let c = ConsumerHandshake::Greeted {
            ours: hello(1, 5, [1; 16], 2),
            binding: [0; 32],
        };
        let welcome = Message::Welcome {
            mac: [0; 32],
            session: SESSION,
        };
        assert!(matches!(
            c.on_message(&secret(1), welcome),
            Err(TransferError::Protocol(WireError::Unexpected {
                message: "WELCOME"
            }))
        ));
    }
}
