//! What one picker tells another: a table of what it was told already, and what is new.

use crate::wire::{self, Message};
use baton_fleet::{Fleet, MAX_ENDPOINTS, Note, Servers};
use baton_scheduler::{EndpointId, UnderWay};
use std::collections::HashMap;
use std::sync::Arc;

/// What the other end knows.
#[derive(Debug, Default)]
pub(crate) struct Teller {
    /// By number; numbers of servers that are gone are given to others.
    told: Vec<Option<Told>>,
    numbers: HashMap<EndpointId, u16>,
    /// The list that the table is of.
    listed: Option<Arc<Servers>>,
}

#[derive(Debug)]
struct Told {
    id: EndpointId,
    under_way: UnderWay,
}

impl Teller {
    /// Appends what changed at the servers of `fleet` since the last time.
    pub(crate) fn loads(&mut self, fleet: &Fleet, out: &mut Vec<u8>) {
        let servers = fleet.servers();
        let same = |listed: &Arc<Servers>| Arc::ptr_eq(listed, &servers);
        if !self.listed.as_ref().is_some_and(same) {
            self.list(&servers, out);
            self.listed = Some(servers.clone());
        }
        for server in servers.iter() {
            let Some(&number) = self.numbers.get(&server.id) else {
                continue;
            };
            let under_way = server.under_way();
            if let Some(Some(told)) = self.told.get_mut(usize::from(number))
                && under_way.is_news(&told.under_way)
            {
                told.under_way = under_way;
                Message::Load { number, under_way }.encode(out);
            }
        }
    }

    /// Appends a note of what was sent where.
    pub(crate) fn note(&mut self, note: &Note, out: &mut Vec<u8>) {
        for id in note.servers.iter().flatten() {
            let Some(&number) = self.numbers.get(id) else {
                continue;
            };
            for blocks in note.prompt.chains().filter(|blocks| !blocks.is_empty()) {
                wire::note(out, number, note.certainty, blocks);
            }
        }
    }

    /// Gives numbers to servers that are new, and takes those of servers that are gone.
    fn list(&mut self, servers: &Servers, out: &mut Vec<u8>) {
        let listed: HashMap<EndpointId, &str> = servers.iter().map(|s| (s.id, s.name())).collect();
        for (number, slot) in (0u16..).zip(&mut self.told) {
            if let Some(gone) = slot.take_if(|told| !listed.contains_key(&told.id)) {
                self.numbers.remove(&gone.id);
                let name = "".into();
                Message::Server { number, name }.encode(out);
            }
        }
        let mut free = 0;
        for server in servers.iter() {
            if self.numbers.contains_key(&server.id) {
                continue;
            }
            while self.told.get(free).is_some_and(Option::is_some) {
                free += 1;
            }
            // A fleet has no more; this only keeps the table from growing.
            let Some(number) = u16::try_from(free).ok().filter(|_| free < MAX_ENDPOINTS) else {
                return;
            };
            if free == self.told.len() {
                self.told.push(None);
            }
            self.told[free] = Some(Told {
                id: server.id,
                under_way: UnderWay::default(),
            });
            self.numbers.insert(server.id, number);
            let name = server.name().into();
            Message::Server { number, name }.encode(out);
        }
    }
}
