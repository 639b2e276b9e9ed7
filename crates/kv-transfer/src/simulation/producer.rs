//! A producer's process: the real lease table, handshakes and sessions, and what its threads do around them.
//!
//! The threads' rules are those of `server` and `server/connection`: a stranger has little time, whoever breaks the protocol
//! loses the connection, a control connection that ends takes its session along, a data connection sends one chunk after
//! the other and looks whether its peer is there only when it has nothing to send.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use baton_kv::KvLayout;

use super::arena::{Arena, Room, SharedArena, truth};
use super::ledger::Ledger;
use super::net::{At, ConnId};
use super::{Air, CAP, CONTROL_SILENCE, PROGRESS, Params, STRANGER, TTL};
use crate::RejectCode;
use crate::checksum::checksum;
use crate::control::{Chunk, Control, Terms, Work};
use crate::geometry::{Piece, Shard};
use crate::handshake::{Answer, ProducerHandshake, hello};
use crate::lease::{LeaseTable, LeaseTerms, SessionId};
use crate::secret::{ConnKey, Secret, UNBOUND};
use crate::wire::{
    ChunkHeader, MAX_BODY, MAX_BODY_BEFORE_AUTH, Message, PREFACE_LEN, Role, Selection, WireError,
    decode_preface, encode_frame,
};

/// Bytes that a data connection holds before its writer has to wait.
const SEND_BUFFER: usize = 1500;

#[derive(Debug)]
pub(super) struct Producer {
    number: usize,
    terms: Arc<Terms>,
    leases: LeaseTable<Room>,
    arena: SharedArena,
    doors: BTreeMap<ConnId, Door>,
    /// By their control connections.
    sessions: BTreeMap<ConnId, Session>,
    buildings: Vec<Building>,
    begun: BTreeMap<u64, Instant>,
    is_draining: bool,
}

/// A connection.
#[derive(Debug)]
struct Door {
    stage: Stage,
    /// When it is closed unless something comes.
    deadline: Instant,
}

#[derive(Debug)]
enum Stage {
    Preface,
    Greeting(ProducerHandshake),
    Attaching,
    Control,
    Data {
        session: ConnId,
        stream: u16,
        blocked: Option<Instant>,
    },
}

#[derive(Debug)]
struct Session {
    control: Control<Room>,
    key: ConnKey,
    ledger: Ledger,
}

/// A lease that grows.
#[derive(Debug)]
struct Building {
    params: Rc<Params>,
    n_blocks: u32,
    n_ready: u32,
}

fn is_before_auth(stage: &Stage) -> bool {
    !matches!(stage, Stage::Control | Stage::Data { .. })
}

impl Producer {
    /// Every process numbers its leases from 1, so that a restarted one uses the old numbers again.
    pub(super) fn new(number: usize, air: &mut Air, ours: Shard, secret: &Secret) -> Self {
        let terms = Terms {
            secret: secret.clone(),
            fingerprint: ours.layout.model_fingerprint,
            ours,
            boot_id: air.dice.roll(),
            chunk_bytes: air.dice.within(20..200) as usize,
            max_streams: 6,
            starvation: PROGRESS,
        };
        Self {
            number,
            terms: Arc::new(terms),
            leases: LeaseTable::new(LeaseTerms { ttl: TTL, cap: CAP }),
            arena: Arena::new(air.arena_bytes),
            doors: BTreeMap::new(),
            sessions: BTreeMap::new(),
            buildings: Vec::new(),
            begun: BTreeMap::new(),
            is_draining: false,
        }
    }

    pub(super) fn ours(&self) -> &Shard {
        &self.terms.ours
    }

    /// The process dies; its system closes what it had open.
    pub(super) fn die(&mut self, air: &mut Air) {
        self.arena.borrow_mut().orphan();
        let doors = std::mem::take(&mut self.doors);
        doors
            .into_keys()
            .for_each(|conn| air.net.close(conn, At::Producer));
    }

    pub(super) fn accept(&mut self, conn: ConnId, now: Instant) {
        let door = Door {
            stage: Stage::Preface,
            deadline: now + STRANGER,
        };
        self.doors.insert(conn, door);
    }

    /// Memory for a consumer on the same machine that shows the password of its control connection.
    pub(super) fn knock(&mut self, boot_id: u64, password: &[u8; 16]) -> Option<SharedArena> {
        let mut sessions = self.sessions.values_mut();
        let session = sessions.find(|session| session.key.is_password(password))?;
        let is_shown = boot_id == self.terms.boot_id && session.control.show_memory();
        is_shown.then(|| Rc::clone(&self.arena))
    }

    /// Announces a lease.
    pub(super) fn begin(&mut self, n_tokens: u32, air: &mut Air) -> Option<Rc<Params>> {
        if self.is_draining {
            return None;
        }
        let lease = self.begun.len() as u64 + 1;
        let n_blocks = self.ours().layout.blocks_for(n_tokens as usize) as u32;
        self.leases.begin(lease, n_blocks, air.now);
        self.begun.insert(lease, air.now);
        let claim = self.terms.claim(lease);
        let params = Rc::new(Params {
            producer: self.number,
            lease,
            token: self.terms.secret.lease_token(&claim, air.dice.bytes()),
            n_tokens,
            theirs: self.ours().clone(),
            seed: Some(air.dice.roll()),
        });
        self.buildings.push(Building {
            params: Rc::clone(&params),
            n_blocks,
            n_ready: 0,
        });
        Some(params)
    }

    /// Some more blocks of one of the leases that grow, if there is memory; `false` if none grows.
    pub(super) fn grow(&mut self, air: &mut Air) -> bool {
        if self.buildings.is_empty() {
            return false;
        }
        let i = air.dice.below(self.buildings.len());
        let building = &mut self.buildings[i];
        let left = building.n_blocks - building.n_ready;
        let n = air.dice.within(1..5).min(left);
        let blocks = building.n_ready..building.n_ready + n;
        let (params, ours) = (&building.params, &self.terms.ours);
        let bytes = truth(
            params.seed.unwrap_or(0),
            &ours.layout,
            &everything(&ours.layout, ours, blocks),
            u32::MAX,
        );
        let Some(room) = Room::new(&self.arena, bytes) else {
            return true;
        };
        building.n_ready += n;
        let is_there = self.leases.append(params.lease, room, n, air.now);
        if !is_there || building.n_ready == building.n_blocks {
            self.buildings.remove(i);
        }
        true
    }

    /// The prompt of a growing lease is given up.
    pub(super) fn abort(&mut self, air: &mut Air) {
        if !self.buildings.is_empty() {
            let i = air.dice.below(self.buildings.len());
            self.leases.abort(self.buildings.remove(i).params.lease);
        }
    }

    /// Somebody with the right to it ends a lease.
    pub(super) fn release(&mut self, lease: u64) {
        self.leases.consume(lease);
    }

    pub(super) fn drain(&mut self, air: &mut Air) {
        self.is_draining = true;
        let code = RejectCode::Draining;
        for &conn in self.sessions.keys() {
            say(air, conn, 0, &Message::GoAway { code });
        }
    }

    /// What its threads do when the time has come.
    pub(super) fn keep_time(&mut self, air: &mut Air) {
        self.leases.expire(air.now);
        let is_late = |door: &Door| match &door.stage {
            Stage::Data { blocked, .. } => blocked.is_some_and(|since| air.now >= since + PROGRESS),
            _ => air.now >= door.deadline,
        };
        let late = self.doors.iter().filter(|(_, door)| is_late(door));
        let late: Vec<_> = late.map(|(&conn, _)| conn).collect();
        late.into_iter().for_each(|conn| self.close(conn, air));
    }

    /// Every thread does something, or is not run this time.
    pub(super) fn step(&mut self, air: &mut Air, is_thorough: bool) {
        let conns: Vec<_> = self.doors.keys().copied().collect();
        for conn in conns {
            if is_thorough || air.dice.once_in(2) {
                self.serve(conn, air);
            }
        }
        for (&conn, session) in &mut self.sessions {
            if is_thorough || air.dice.once_in(2) {
                let news = session.control.tell(&self.leases);
                news.iter().for_each(|message| say(air, conn, 0, message));
            }
        }
    }

    fn serve(&mut self, conn: ConnId, air: &mut Air) {
        let Some(door) = self.doors.get(&conn) else {
            return;
        };
        if let &Stage::Data {
            session, stream, ..
        } = &door.stage
        {
            return self.send_some(conn, (session, stream), air);
        }
        match self.hear(conn, air) {
            Ok(true) => {}
            Ok(false) if air.net.is_over(conn, At::Producer) => self.close(conn, air),
            Ok(false) => {}
            Err(_) => self.close(conn, air),
        }
    }

    /// Takes the next message; `false` if there is none.
    fn hear(&mut self, conn: ConnId, air: &mut Air) -> Result<bool, WireError> {
        let Some(door) = self.doors.get_mut(&conn) else {
            return Ok(false);
        };
        if matches!(door.stage, Stage::Preface) {
            if air.net.inbox(conn, At::Producer).len() < PREFACE_LEN {
                return Ok(false);
            }
            let preface = air.net.take(conn, At::Producer, PREFACE_LEN);
            door.stage = match decode_preface(&preface)?.role {
                Role::Data => Stage::Attaching,
                Role::Control => greeting(&self.terms, conn, air),
            };
            return Ok(true);
        }
        let max_body = match is_before_auth(&door.stage) {
            true => MAX_BODY_BEFORE_AUTH,
            false => MAX_BODY,
        };
        let Some((stream, message)) = air.net.frame((conn, At::Producer), max_body)? else {
            return Ok(false);
        };
        match &mut door.stage {
            Stage::Greeting(handshake) => {
                let answer = handshake.on_message(&self.terms.secret, &message);
                self.greet(conn, answer, air);
            }
            Stage::Attaching => self.attach(conn, &message, air),
            _ => {
                door.deadline = air.now + CONTROL_SILENCE;
                self.answer(conn, (stream, message), air)?;
            }
        }
        Ok(true)
    }

    fn greet(&mut self, conn: ConnId, answer: Answer, air: &mut Air) {
        match answer {
            Answer::Continue(messages) => {
                messages
                    .iter()
                    .for_each(|message| say(air, conn, 0, message));
            }
            Answer::Refuse(code) => {
                say(air, conn, 0, &Message::GoAway { code });
                self.close(conn, air);
            }
            Answer::Welcome(welcome, key) => {
                assert!(air.may_enter(conn), "a stranger got in");
                let control = Control::new(SessionId(conn), Arc::clone(&self.terms));
                let session = Session {
                    control,
                    key,
                    ledger: Ledger::default(),
                };
                self.sessions.insert(conn, session);
                self.doors.insert(
                    conn,
                    Door {
                        stage: Stage::Control,
                        deadline: air.now + CONTROL_SILENCE,
                    },
                );
                say(air, conn, 0, &welcome);
            }
        }
    }

    fn attach(&mut self, conn: ConnId, message: &Message, air: &mut Air) {
        let Message::Attach { session, proof } = message else {
            return self.close(conn, air);
        };
        let session = *session;
        let proved = self.sessions.get_mut(&session);
        let proved = proved.filter(|session| session.key.is_attach(&UNBOUND, proof));
        let attached = proved.ok_or(RejectCode::Unauthorized).and_then(|session| {
            let stream = session.control.attach().ok_or(RejectCode::Busy)?;
            Ok((stream, session.key.attached_proof(&UNBOUND, stream)))
        });
        match attached {
            Ok((stream, proof)) => {
                let stage = Stage::Data {
                    session,
                    stream,
                    blocked: None,
                };
                let deadline = air.now;
                self.doors.insert(conn, Door { stage, deadline });
                say(air, conn, stream, &Message::Attached { stream, proof });
            }
            Err(code) => {
                say(air, conn, 0, &Message::GoAway { code });
                self.close(conn, air);
            }
        }
    }

    fn answer(
        &mut self,
        conn: ConnId,
        (of, message): (u16, Message),
        air: &mut Air,
    ) -> Result<(), WireError> {
        let Some(session) = self.sessions.get_mut(&conn) else {
            return Ok(());
        };
        let heard = message.clone();
        let leases = &mut self.leases;
        // Somebody else fetches it, or whoever says so has no right to it.
        let is_to_stay = match &heard {
            Message::Release { lease, token } => leases.open_by(*lease).is_some_and(|open| {
                open.is_some_and(|(holder, _)| holder != SessionId(conn))
                    || !self.terms.grants(*lease, token)
            }),
            _ => false,
        };
        let answer = session.control.on_message((of, message), leases, air.now)?;
        if let (true, Message::Release { lease, .. }) = (is_to_stay, &heard) {
            let open = leases.open_by(*lease);
            assert!(open.is_some(), "a lease is released that was to stay");
        }
        session.ledger.heard(of, &heard, answer.as_ref());
        if let Some(answer) = answer {
            say(air, conn, of, &answer);
        }
        Ok(())
    }

    /// A turn of a data connection's thread.
    fn send_some(&mut self, conn: ConnId, (of, stream): (ConnId, u16), air: &mut Air) {
        let is_full = air.net.backlog(conn, At::Consumer) > SEND_BUFFER;
        if let Some(Door {
            stage: Stage::Data { blocked, .. },
            ..
        }) = self.doors.get_mut(&conn)
        {
            *blocked = is_full.then(|| blocked.unwrap_or(air.now));
        }
        let Some(session) = self.sessions.get_mut(&of).filter(|_| !is_full) else {
            if !is_full {
                self.close(conn, air);
            }
            return;
        };
        match session.control.work(stream, &mut self.leases, air.now) {
            Work::Send(chunk) => {
                session.ledger.sent(&chunk);
                if !air.net.send(conn, At::Consumer, wire(&chunk)) {
                    self.close(conn, air);
                }
            }
            Work::Say(message) => {
                session.ledger.ended(&message);
                say(air, of, stream, &message);
            }
            Work::Idle => {
                let is_gone = air.net.is_over(conn, At::Producer)
                    || !air.net.inbox(conn, At::Producer).is_empty();
                if is_gone {
                    self.close(conn, air);
                }
            }
            Work::Close => self.close(conn, air),
        }
    }

    fn close(&mut self, conn: ConnId, air: &mut Air) {
        air.net.close(conn, At::Producer);
        let Some(door) = self.doors.remove(&conn) else {
            return;
        };
        match door.stage {
            Stage::Control => {
                if let Some(mut session) = self.sessions.remove(&conn) {
                    session.control.end(&mut self.leases);
                }
            }
            Stage::Data {
                session, stream, ..
            } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.ledger.detached(stream);
                    session.control.detach(stream, &mut self.leases);
                }
            }
            _ => {}
        }
    }

    /// What must hold at every step.
    pub(super) fn check(&self, now: Instant) {
        for (&lease, &begun) in &self.begun {
            let Some(open) = self.leases.open_by(lease) else {
                continue;
            };
            assert!(now < begun + CAP, "lease {lease} outlives its cap");
            let mut n_open = 0;
            for (&conn, session) in &self.sessions {
                let n = session.control.leases_open().filter(|id| *id == lease);
                let n = n.count() as u32;
                let is_holder = open.is_some_and(|(holder, _)| holder == SessionId(conn));
                assert!(n == 0 || is_holder, "lease {lease} is read by two");
                n_open += n;
            }
            let counted = open.map_or(0, |(_, n)| n);
            assert_eq!(counted, n_open, "transfers of lease {lease}");
        }
    }

    /// What must hold when everybody has gone.
    pub(super) fn check_empty(&self) {
        assert!(self.buildings.is_empty(), "a prompt that is never computed");
        assert_eq!(self.leases.len(), 0, "leases are left");
        assert!(self.arena.borrow().is_empty(), "memory is left");
        assert!(
            self.sessions.is_empty() && self.doors.is_empty(),
            "connections are left"
        );
    }

    /// What must hold when nothing runs any more, though connections may be open.
    pub(super) fn check_quiet(&self) {
        for session in self.sessions.values() {
            let n = session.control.leases_open().count();
            assert_eq!(n, 0, "transfers are left {:?}", session.control);
        }
    }
}

/// All that a producer has of some blocks.
pub(super) fn everything(
    layout: &KvLayout,
    ours: &Shard,
    blocks: std::ops::Range<u32>,
) -> Selection {
    Selection {
        layers: 0..layout.n_layers,
        heads: ours.heads.clone(),
        blocks,
        block_size: layout.block_size,
    }
}

fn greeting(terms: &Terms, conn: ConnId, air: &mut Air) -> Stage {
    let ours = hello(terms.boot_id, terms.fingerprint, air.dice.bytes(), 4);
    let challenge = air.dice.bytes();
    Stage::Greeting(ProducerHandshake::new(ours, challenge, conn, UNBOUND))
}

fn say(air: &mut Air, conn: ConnId, stream: u16, message: &Message) {
    // A message that cannot be written is found out when the connection is read next.
    air.net
        .send(conn, At::Consumer, encode_frame(stream, message));
}

/// A chunk's bytes, header first.
fn wire(chunk: &Chunk<Room>) -> Vec<u8> {
    let mut payload = Vec::new();
    for piece in chunk.content.source.pieces(chunk.range.clone()) {
        match piece {
            Piece::Bytes(part, range) => {
                payload.extend_from_slice(&chunk.content.parts[part].bytes[range]);
            }
            Piece::Zeros(n) => payload.resize(payload.len() + n, 0),
        }
    }
    let header = ChunkHeader {
        xfer: chunk.xfer,
        chunk: chunk.chunk,
        len: payload.len() as u32,
        offset: chunk.range.start as u64,
        crc: checksum(&payload),
    };
    [&header.encode()[..], &payload].concat()
}
