//! The one plain thread that owns the engine: take commands, step, publish, measure; sleep when there is nothing to do.
//!
//! A failure of the device, or a panic, ends the thread: what the KV holds is unknown then. Everybody who waits for
//! events finds the channel closed, and [`EngineThread::ended`] tells the server.

mod kv;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use baton_engine::{Engine, Event, FinishReason, Progress, RunnerError, Sampled, SeqId, Stats};
use baton_kv::CacheChange;
use baton_kv_events::Feed;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::books::Books;
use crate::inbox::{Admission, Command, Ending, Inbox, Update};
use crate::metrics::{Finished, Metrics, Spent};
use crate::outgoing::Leaving;
use crate::patience::Recompute;

/// The thread, from outside.
#[derive(Debug)]
pub(crate) struct EngineThread {
    pub(crate) inbox: Inbox,
    /// Cancelled when the thread has ended, for whatever reason.
    pub(crate) ended: CancellationToken,
    thread: JoinHandle<Result<(), RunnerError>>,
}

/// How the thread ended.
#[derive(Debug, thiserror::Error)]
pub enum EngineFailure {
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(#[from] RunnerError),
    /// A bug.
    #[error("the engine thread panicked")]
    Panic,
}

impl EngineThread {
    /// Starts the thread with room for `capacity` commands.
    pub(crate) fn start(
        engine: Engine,
        capacity: usize,
        metrics: Arc<Metrics>,
        feed: Option<Feed>,
    ) -> std::io::Result<Self> {
        let (inbox, commands) = Inbox::new(capacity);
        let ended = CancellationToken::new();
        let on_end = ended.clone().drop_guard();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                // Moved in, so that it also fires when the thread unwinds.
                let _on_end = on_end;
                let driver = Driver {
                    engine,
                    inbox: commands,
                    open: HashMap::new(),
                    metrics,
                    seen: Stats::default(),
                    feed,
                    changes: Vec::new(),
                };
                driver.run()
            })?;
        Ok(Self {
            inbox,
            ended,
            thread,
        })
    }

    /// Tells the thread to be done and waits for it. Blocks.
    pub(crate) fn stop(self) -> Result<(), EngineFailure> {
        self.inbox.stop();
        match self.thread.join() {
            Ok(ended) => Ok(ended?),
            Err(_) => Err(EngineFailure::Panic),
        }
    }
}

/// A sequence that the engine has.
struct Open {
    choice: usize,
    updates: mpsc::Sender<Update>,
    ending: Ending,
    books: Books,
    recompute: Recompute,
    /// On KV that came.
    spent: Spent,
    leaving: Option<Leaving>,
}

struct Driver {
    engine: Engine,
    inbox: Receiver<Command>,
    open: HashMap<SeqId, Open>,
    metrics: Arc<Metrics>,
    /// The engine's counters when they were last looked at.
    seen: Stats,
    /// Where changes of the prefix cache go.
    feed: Option<Feed>,
    /// Empty between two steps.
    changes: Vec<CacheChange>,
}

/// How long an idle thread waits before it tries again to hand over what did not fit.
const TRY_AGAIN: Duration = Duration::from_millis(50);

impl Driver {
    fn run(mut self) -> Result<(), RunnerError> {
        let mut events = Vec::new();
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                if !self.obey(command)? {
                    return Ok(());
                }
            }
            self.end_what_nobody_wants();
            let begun = Instant::now();
            let progress = self.engine.step(&mut events)?;
            self.engine.took(begun.elapsed());
            self.publish(&mut events)?;
            self.measure();
            let is_behind = self.tell_of_cache();
            if progress == Progress::Idle {
                let command = match self.sleep(is_behind) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                };
                if !self.obey(command)? {
                    return Ok(());
                }
            }
        }
    }

    /// Waits for a command; not for long, if something else is to be done.
    fn sleep(&self, is_behind: bool) -> Result<Command, RecvTimeoutError> {
        if is_behind {
            return self.inbox.recv_timeout(TRY_AGAIN);
        }
        let command = self.inbox.recv();
        command.map_err(|_| RecvTimeoutError::Disconnected)
    }

    /// Hands over what the step changed in the prefix cache; whether some of it must wait.
    fn tell_of_cache(&mut self) -> bool {
        let Some(feed) = &mut self.feed else {
            return false;
        };
        self.engine.take_cache_changes(&mut self.changes);
        feed.offer(&mut self.changes);
        feed.is_behind()
    }

    /// `false`: be done.
    fn obey(&mut self, command: Command) -> Result<bool, RunnerError> {
        match command {
            Command::Admit(admission) => self.admit(admission),
            Command::KvArrived(seq, pulled) => self.place(seq, &pulled)?,
            Command::KvFailed(seq, lost) => self.lose(seq, lost),
            Command::Wake => {}
            Command::Stop => return Ok(false),
        }
        Ok(true)
    }

    fn admit(&mut self, admission: Admission) {
        if let Some(refusal) = self.too_much(&admission) {
            let _ = admission.updates.try_send(refusal);
            return;
        }
        let Admission {
            sequences,
            endings,
            updates,
            arrived,
            mut outgoing,
            lost,
            recompute,
        } = admission;
        let mut ids = Vec::with_capacity(sequences.len());
        for (choice, (sequence, ending)) in sequences.into_iter().zip(endings).enumerate() {
            let (id, mut books) = (sequence.id, Books::open(sequence.prompt.len(), arrived));
            if let Some(lost) = lost {
                books.lose(lost);
            }
            self.metrics
                .sizes
                .max_tokens
                .observe(f64::from(sequence.limits.max_tokens));
            if let Err(error) = self.engine.add(sequence) {
                self.take_back(&ids);
                self.metrics.rejections.inc();
                // If the receiver is gone, nobody wants to know.
                let _ = updates.try_send(Update::Refused(error));
                return;
            }
            ids.push(id);
            let updates = updates.clone();
            self.open.insert(
                id,
                Open {
                    choice,
                    updates,
                    ending,
                    books,
                    recompute,
                    spent: Spent::default(),
                    leaving: outgoing.take(),
                },
            );
        }
    }

    fn take_back(&mut self, ids: &[SeqId]) {
        for &id in ids {
            self.engine.cancel(id);
            self.open.remove(&id);
        }
    }

    fn end_what_nobody_wants(&mut self) {
        let Self {
            engine,
            open,
            metrics,
            ..
        } = self;
        open.retain(|&id, sequence| match sequence.ending.asked() {
            None => true,
            Some(reason) => {
                engine.cancel(id);
                sequence.books.close(reason, metrics);
                false
            }
        });
    }

    fn publish(&mut self, events: &mut Vec<Event>) -> Result<(), RunnerError> {
        let now = Instant::now();
        for event in events.drain(..) {
            match event {
                Event::Token {
                    seq,
                    sampled,
                    finish,
                    cached_tokens,
                } => {
                    self.token(
                        now,
                        seq,
                        Token {
                            sampled,
                            finish,
                            cached_tokens,
                        },
                    );
                }
                Event::FetchKv {
                    seq,
                    first_block,
                    n_blocks,
                } => {
                    let update = Update::FetchKv {
                        seq,
                        first_block,
                        n_blocks,
                    };
                    let n_found = first_block * self.engine.spec().layout.block_size;
                    let told = self.open.get_mut(&seq).is_some_and(|s| {
                        s.books.fetch(n_found);
                        s.updates.try_send(update).is_ok()
                    });
                    if !told {
                        self.engine.kv_failed(seq);
                    }
                }
                Event::Export {
                    seq,
                    blocks,
                    n_tokens,
                } => {
                    if let Some(sequence) = self.open.get_mut(&seq) {
                        let metrics = &self.metrics;
                        sequence.hand_on(&mut self.engine, &blocks, n_tokens, metrics)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn token(&mut self, now: Instant, seq: SeqId, token: Token) {
        // A sequence that was just cancelled may have one more token on its way.
        let Some(sequence) = self.open.get_mut(&seq) else {
            return;
        };
        sequence
            .books
            .token(now, token.cached_tokens, &self.metrics);
        let finish = token.finish;
        let sent = sequence.updates.try_send(Update::Token {
            choice: sequence.choice,
            sampled: token.sampled,
            finish: token.finish,
            cached_tokens: token.cached_tokens,
        });
        if let Some(finish) = finish {
            let reason = match finish {
                FinishReason::Length => Finished::Length,
                FinishReason::Stop { .. } => Finished::Stop,
            };
            sequence.books.close(reason, &self.metrics);
            self.open.remove(&seq);
        } else if sent.is_err() {
            sequence.ending.abandon();
        }
    }

    fn measure(&mut self) {
        let stats = self.engine.stats();
        let series = &self.metrics.engine;
        self.metrics.kv.awaiting(stats.awaiting_kv);
        series.running.set(i64::from(stats.running));
        // As in vLLM, who waits for KV waits.
        series
            .waiting
            .set(i64::from(stats.waiting) + i64::from(stats.awaiting_kv));
        series
            .kv_usage
            .set(f64::from(stats.blocks_used) / f64::from(stats.blocks_total.max(1)));
        series
            .prefix_queries
            .inc_by(stats.prefix_queries - self.seen.prefix_queries);
        series
            .prefix_hits
            .inc_by(stats.prefix_hits - self.seen.prefix_hits);
        series
            .external_queries
            .inc_by(stats.external_queries - self.seen.external_queries);
        series
            .external_hits
            .inc_by(stats.external_hits - self.seen.external_hits);
        series
            .preemptions
            .inc_by(stats.preemptions - self.seen.preemptions);
        if stats.iterations > self.seen.iterations {
            series
                .step_tokens
                .observe(f64::from(stats.last_iteration_tokens));
        }
        self.seen = stats;
    }
}

struct Token {
    sampled: Sampled,
    finish: Option<FinishReason>,
    cached_tokens: u32,
}
