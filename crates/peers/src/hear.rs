//! What a picker hears of another. Dropped, it is forgotten; but for notes, which age as its own do.

use crate::wire::{Message, WireError};
use baton_fleet::{Elsewhere, Fleet, Server, Servers};
use baton_scheduler::UnderWay;
use std::collections::HashMap;
use std::sync::Arc;

/// What another picker told.
#[derive(Debug)]
pub(crate) struct Hearer {
    fleet: Arc<Fleet>,
    /// By number.
    known: Vec<Option<Known>>,
    /// The list in which names were looked up.
    listed: Arc<Servers>,
    by_name: HashMap<Box<str>, Arc<Server>>,
    /// Whether the other end cuts prompts as this one does.
    takes_notes: bool,
}

#[derive(Debug)]
struct Known {
    name: Box<str>,
    under_way: UnderWay,
    /// Where it counts, if the server is listed here.
    counted: Option<Elsewhere>,
}

/// Why nothing more is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HearError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("greetings come first, and once")]
    Unexpected,
}

impl Hearer {
    pub(crate) fn new(fleet: Arc<Fleet>, takes_notes: bool) -> Self {
        let mut hearer = Self {
            listed: fleet.servers(),
            fleet,
            known: Vec::new(),
            by_name: HashMap::new(),
            takes_notes,
        };
        hearer.look_up();
        hearer
    }

    /// Takes the messages that are whole in `bytes`, and says how many bytes they were.
    pub(crate) fn hear(&mut self, bytes: &[u8]) -> Result<usize, HearError> {
        let servers = self.fleet.servers();
        if !Arc::ptr_eq(&servers, &self.listed) {
            self.listed = servers;
            self.look_up();
        }
        let (mut done, mut changed) = (0, false);
        while let Some((message, length)) = Message::decode(&bytes[done..])? {
            done += length;
            changed |= self.take(message)?;
        }
        if changed {
            self.fleet.others_changed();
        }
        Ok(done)
    }

    /// Says whether what is in flight has changed.
    fn take(&mut self, message: Message) -> Result<bool, HearError> {
        match message {
            Message::Hello(_) | Message::Proof(_) => return Err(HearError::Unexpected),
            Message::Beat => {}
            Message::Server { number, name } => {
                self.name(number, name);
                return Ok(true);
            }
            Message::Load { number, under_way } => {
                if let Some(known) = self.at(number) {
                    known.under_way = under_way;
                    known.counted.iter_mut().for_each(|c| c.set(under_way));
                    return Ok(true);
                }
            }
            Message::Note {
                number,
                certainty,
                blocks,
            } => {
                let listed = self.known.get(usize::from(number)).and_then(Option::as_ref);
                let server = listed.and_then(|known| self.by_name.get(&known.name));
                if let Some(server) = server.filter(|_| self.takes_notes) {
                    self.fleet.heard(server.id, &blocks, certainty);
                }
            }
        }
        Ok(false)
    }

    fn at(&mut self, number: u16) -> Option<&mut Known> {
        self.known.get_mut(usize::from(number))?.as_mut()
    }

    fn name(&mut self, number: u16, name: Box<str>) {
        let at = usize::from(number);
        if self.known.len() <= at {
            // No number is as large as the table may get.
            self.known.resize_with(at + 1, || None);
        }
        self.known[at] = (!name.is_empty()).then(|| Known {
            counted: self.by_name.get(&name).map(Elsewhere::at),
            name,
            under_way: UnderWay::default(),
        });
    }

    /// Finds all names again, after the list has changed.
    fn look_up(&mut self) {
        let named = |s: &Arc<Server>| (s.name().into(), s.clone());
        self.by_name = self.listed.iter().map(named).collect();
        for known in self.known.iter_mut().flatten() {
            let server = self.by_name.get(&known.name);
            let stays = |c: &Elsewhere| server.is_some_and(|s| c.is_at(s));
            if known.counted.as_ref().is_some_and(stays) {
                continue;
            }
            known.counted = server.map(Elsewhere::at);
            known
                .counted
                .iter_mut()
                .for_each(|c| c.set(known.under_way));
        }
    }
}
