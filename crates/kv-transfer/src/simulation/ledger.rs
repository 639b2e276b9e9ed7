//! What a session may send, counted from its messages alone: the other account of what the cores decide.

use std::collections::BTreeMap;

use super::arena::Room;
use crate::control::Chunk;
use crate::wire::{MEMORY, Message};

/// Transfers that run over data connections, by number.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    running: BTreeMap<u32, Account>,
}

#[derive(Debug)]
struct Account {
    stream: u16,
    granted: u64,
    sent: u64,
}

impl Ledger {
    pub(super) fn heard(&mut self, stream: u16, message: &Message, answer: Option<&Message>) {
        match (message, answer) {
            (Message::Open(open), Some(Message::Accept { .. })) => {
                assert_ne!(stream, MEMORY, "chunks need a connection");
                let account = Account {
                    stream,
                    granted: open.credit,
                    sent: 0,
                };
                self.running.insert(open.xfer, account);
            }
            (Message::Credit { xfer, bytes }, _) => {
                if let Some(account) = self.running.get_mut(xfer) {
                    account.granted = account.granted.saturating_add(*bytes);
                }
            }
            (Message::Nack { xfer, .. }, Some(Message::Reject { .. }))
            | (Message::Received { xfer }, _)
            | (_, Some(Message::Cancelled { xfer })) => {
                self.running.remove(xfer);
            }
            _ => {}
        }
    }

    /// A data connection's thread has said the last word about a transfer.
    pub(super) fn ended(&mut self, message: &Message) {
        if let Message::Cancelled { xfer } | Message::Reject { xfer, .. } = message {
            self.running.remove(xfer);
        }
    }

    pub(super) fn detached(&mut self, stream: u16) {
        self.running.retain(|_, account| account.stream != stream);
    }

    /// # Panics
    /// When the chunk should not have been sent.
    pub(super) fn sent(&mut self, chunk: &Chunk<Room>) {
        let account = self.running.get_mut(&chunk.xfer);
        let account = account.expect("no byte of a transfer follows its end");
        account.sent += chunk.range.len() as u64;
        let Account { granted, sent, .. } = account;
        assert!(sent <= granted, "{sent} bytes are sent, {granted} granted");
    }
}
