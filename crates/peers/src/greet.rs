//! Both ends prove that they know the secret, before anything else is said.
//!
//! ```text
//! teller                      hearer
//!   HELLO ---------------------->
//!   <---------------------- HELLO
//!   PROOF ---------------------->
//!   <---------------------- PROOF
//! ```
//! The hearer answers only who has proved itself, so that it tells a stranger nothing but that it is there.

use crate::secret::{End, Secret, Transcript};
use crate::wire::{Hello, Message, WireError};
use baton_http::Binding;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Greetings are short.
const MAX_GREETING: usize = 64;

/// Why two pickers do not talk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GreetError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the other end does not greet")]
    Rude,
    #[error("the other end does not know the secret")]
    Stranger,
    #[error("the other end is this picker itself")]
    Myself,
}

/// What one end brings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ours<'a> {
    pub(crate) hello: Hello,
    pub(crate) secret: &'a Secret,
    pub(crate) binding: Binding,
}

/// Greets as who connected. Returns the other end's hello.
pub(crate) async fn as_teller<S>(stream: &mut S, ours: Ours<'_>) -> Result<Hello, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    write(stream, &Message::Hello(ours.hello)).await?;
    let hearer = hello(&read(stream).await?)?;
    if hearer.instance == ours.hello.instance {
        return Err(GreetError::Myself);
    }
    let transcript = Transcript {
        teller: ours.hello,
        hearer,
        binding: ours.binding,
    };
    let proof = ours.secret.proof(End::Teller, &transcript);
    write(stream, &Message::Proof(proof)).await?;
    proved(&read(stream).await?, &ours, End::Hearer, &transcript)?;
    Ok(hearer)
}

/// Greets as who listened. Returns the other end's hello.
pub(crate) async fn as_hearer<S>(stream: &mut S, ours: Ours<'_>) -> Result<Hello, GreetError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let teller = hello(&read(stream).await?)?;
    write(stream, &Message::Hello(ours.hello)).await?;
    if teller.instance == ours.hello.instance {
        return Err(GreetError::Myself);
    }
    let transcript = Transcript {
        teller,
        hearer: ours.hello,
        binding: ours.binding,
    };
    proved(&read(stream).await?, &ours, End::Teller, &transcript)?;
    let proof = ours.secret.proof(End::Hearer, &transcript);
    write(stream, &Message::Proof(proof)).await?;
    Ok(teller)
}

fn hello(message: &Message) -> Result<Hello, GreetError> {
    match message {
        Message::Hello(hello) => Ok(*hello),
        _ => Err(GreetError::Rude),
    }
}

fn proved(
    message: &Message,
    ours: &Ours<'_>,
    of: End,
    transcript: &Transcript,
) -> Result<(), GreetError> {
    match message {
        Message::Proof(proof) if ours.secret.is_proof(of, transcript, proof) => Ok(()),
        Message::Proof(_) => Err(GreetError::Stranger),
        _ => Err(GreetError::Rude),
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, message: &Message) -> io::Result<()> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Reads one frame and not a byte more.
async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Message, GreetError> {
    let mut frame = [0; MAX_GREETING];
    stream.read_exact(&mut frame[..4]).await?;
    let length = frame.first_chunk().map_or(0, |l| u32::from_le_bytes(*l)) as usize;
    let body = frame.get_mut(4..4 + length.min(MAX_GREETING));
    stream.read_exact(body.ok_or(GreetError::Rude)?).await?;
    match Message::decode(&frame[..4 + length])? {
        Some((message, _)) => Ok(message),
        None => Err(GreetError::Rude),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: u64) -> Hello {
        Hello {
            instance,
            block_bytes: 64,
            nonce: [7; 16],
        }
    }

    async fn greet(
        teller: (u64, u8, u8),
        hearer: (u64, u8, u8),
    ) -> (Result<Hello, GreetError>, Result<Hello, GreetError>) {
        let secrets = [teller.1, hearer.1].map(|byte| Secret::new(&[byte; 32]).unwrap());
        let ours = |side: (u64, u8, u8), secret| Ours {
            hello: hello(side.0),
            secret,
            binding: [side.2; 32],
        };
        let (mut a, mut b) = tokio::io::duplex(256);
        let (ours_a, ours_b) = (ours(teller, &secrets[0]), ours(hearer, &secrets[1]));
        let teller = async move { as_teller(&mut a, ours_a).await };
        let hearer = async move { as_hearer(&mut b, ours_b).await };
        tokio::join!(teller, hearer)
    }

    #[tokio::test]
    async fn who_knows_the_secret_is_let_in() {
        let (teller, hearer) = greet((1, 5, 9), (2, 5, 9)).await;
        assert_eq!(teller.unwrap().instance, 2);
        assert_eq!(hearer.unwrap().instance, 1);
    }

    #[tokio::test]
    async fn strangers_and_whoever_is_between_two_are_not() {
        for other in [(2, 6, 9), (2, 5, 8)] {
            let (teller, hearer) = greet((1, 5, 9), other).await;
            assert!(matches!(hearer, Err(GreetError::Stranger)));
            // It is told nothing.
            assert!(matches!(teller, Err(GreetError::Io(_))));
        }
    }

    #[tokio::test]
    async fn a_picker_knows_itself() {
        let (teller, hearer) = greet((1, 5, 9), (1, 5, 9)).await;
        assert!(matches!(teller, Err(GreetError::Myself)));
        assert!(matches!(hearer, Err(GreetError::Myself)));
    }

    #[tokio::test]
    async fn nonsense_is_refused_without_being_waited_for() {
        for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 8], &[1, 0, 0, 0, 6]] {
            let (mut a, mut b) = tokio::io::duplex(256);
            a.write_all(nonsense).await.unwrap();
            let secret = Secret::new(&[5; 32]).unwrap();
            let ours = Ours {
                hello: hello(1),
                secret: &secret,
                binding: [0; 32],
            };
            assert!(as_hearer(&mut b, ours).await.is_err());
        }
    }
}
