//! Follows a pool: watches that never end, each put up again after a while when it falls.

use crate::PoolName;
use crate::backoff::{Backoff, chance, shortened};
use crate::kinds::{self, Kind, Nothing, Object, ObjectiveSpec, PodStatus, PoolSpec, RewriteSpec};
use crate::rules::{self, Pod, Pool};
use crate::state::{Event, Known, News, PoolState};
use futures_util::StreamExt as _;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// How long the API server may keep a watch open, in seconds. A connection that died without a word is noticed a little later.
const WATCH_S: u32 = 60;
/// Objects that were read and not yet taken in.
const QUEUE: usize = 256;
/// So many events make one snapshot at most.
const TOGETHER: usize = 4096;

/// How soon to try again.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// After the first failure.
    pub retry_first: Duration,
    /// After many, and after a refusal.
    pub retry_most: Duration,
    /// To look whether optional kinds are served by now, and where.
    pub recheck: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            retry_first: Duration::from_millis(100),
            retry_most: Duration::from_secs(5),
            recheck: Duration::from_secs(30),
        }
    }
}

/// Keeps `state` as the API server has the pool, until the last receiver is gone. A pool that is given `itself` is not
/// looked for: only its pods are, and what names it.
///
/// Failures are logged and tried again without end; what was known stays meanwhile.
pub async fn follow(
    client: Client,
    name: PoolName,
    itself: Option<Pool>,
    pace: Pace,
    state: watch::Sender<Arc<PoolState>>,
) {
    let to = Server { client, name, pace };
    let mut known = Known::new(to.name.clone());
    let mut pools = itself.is_none().then(|| to.pools());
    if itself.is_some() {
        known.apply(Event::Pool(News::Put(to.name.name.clone(), itself)));
    }
    let mut extras = [to.objectives(), to.rewrites()];
    let mut pods: Option<(String, Source)> = None;
    loop {
        let selector = known.pool().and_then(Pool::label_selector);
        if selector.as_ref() != pods.as_ref().map(|(selector, _)| selector) {
            pods = selector.map(|selector| (selector.clone(), to.pods(&selector)));
        }
        let [objectives, rewrites] = &mut extras;
        let event = tokio::select! {
            event = next(pools.as_mut()) => event,
            event = next(pods.as_mut().map(|(_, source)| source)) => event,
            event = objectives.events.recv() => event,
            event = rewrites.events.recv() => event,
            () = state.closed() => None,
        };
        let Some(event) = event else { return };
        let mut changed = known.apply(event);
        // A burst makes one snapshot instead of one each.
        let rest = std::iter::from_fn(|| {
            let [objectives, rewrites] = &mut extras;
            let pods = pods.as_mut().map(|(_, source)| source);
            let sources = [pools.as_mut(), pods, Some(objectives), Some(rewrites)];
            sources
                .into_iter()
                .flatten()
                .find_map(|s| s.events.try_recv().ok())
        });
        for event in rest.take(TOGETHER) {
            changed |= known.apply(event);
        }
        if changed {
            state.send_replace(Arc::new(known.snapshot()));
        }
    }
}

/// The next event of a source, if there is one.
async fn next(source: Option<&mut Source>) -> Option<Event> {
    match source {
        Some(source) => source.events.recv().await,
        None => std::future::pending().await,
    }
}

/// A task that watches one kind, and what it has seen. Dropped, it ends.
struct Source {
    events: mpsc::Receiver<Event>,
    _task: JoinSet<()>,
}

impl Source {
    fn start<F: Future<Output = ()> + Send + 'static>(
        run: impl FnOnce(mpsc::Sender<Event>) -> F,
    ) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        let mut task = JoinSet::new();
        task.spawn(run(sender));
        Self {
            events,
            _task: task,
        }
    }
}

/// The API server, as one pool needs it.
#[derive(Clone)]
struct Server {
    client: Client,
    name: PoolName,
    pace: Pace,
}

impl Server {
    fn pools(&self) -> Source {
        let this = self.clone();
        let old = self.name.group == kinds::OLD_GROUP;
        let kind = if old { kinds::OLD_POOLS } else { kinds::POOLS };
        let config = config().fields(&format!("metadata.name={}", self.name.name));
        Source::start(|out| async move {
            let read = |object: Object<PoolSpec>| Some(Pool::read(&object.spec));
            this.watch(kind, config, &read, Event::Pool, &out).await;
        })
    }

    fn pods(&self, selector: &str) -> Source {
        let this = self.clone();
        let config = config().labels(selector);
        Source::start(|out| async move {
            let read = |object: Object<Nothing, PodStatus>| Pod::read(object);
            this.watch(kinds::PODS, config, &read, Event::Pod, &out)
                .await;
        })
    }

    fn objectives(&self) -> Source {
        let this = self.clone();
        Source::start(|out| async move {
            let read =
                |object: Object<ObjectiveSpec>| rules::read_objective(&this.name, &object.spec);
            this.watch_optional(kinds::OBJECTIVES, &read, Event::Objective, &out)
                .await;
        })
    }

    fn rewrites(&self) -> Source {
        let this = self.clone();
        Source::start(|out| async move {
            let read = |object: Object<RewriteSpec>| rules::read_rewrite(&this.name, object);
            this.watch_optional(kinds::REWRITES, &read, Event::Rewrite, &out)
                .await;
        })
    }

    /// Watches one kind for as long as somebody listens.
    async fn watch<Spec: Part, Status: Part, T>(
        &self,
        kind: Kind,
        config: watcher::Config,
        read: &impl Fn(Object<Spec, Status>) -> Option<T>,
        event: fn(News<T>) -> Event,
        out: &mpsc::Sender<Event>,
    ) {
        let api: Api<Object<Spec, Status>> =
            Api::namespaced_with(self.client.clone(), &self.name.namespace, &kind);
        let mut backoff = Backoff::new(self.pace.retry_first, self.pace.retry_most);
        let mut trouble = Trouble::default();
        let mut events = pin!(watcher(api.clone(), config.clone()));
        while let Some(seen) = events.next().await {
            let error = match seen {
                Ok(seen) => {
                    if settled(&seen) {
                        backoff.reset();
                        trouble.over(kind);
                    }
                    if out.send(event(news(seen, read))).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(error) => error,
            };
            trouble.tell(kind, &error);
            match status(&error) {
                // The past is forgotten: only a new list helps.
                Some(410) => {
                    tokio::time::sleep(backoff.next(chance())).await;
                    events.set(watcher(api.clone(), config.clone()));
                }
                Some(401 | 403 | 404) => {
                    tokio::time::sleep(shortened(self.pace.retry_most, chance())).await;
                    // Who may list but not watch learns of changes this way.
                    events.set(watcher(api.clone(), config.clone()));
                }
                _ => tokio::time::sleep(backoff.next(chance())).await,
            }
        }
    }

    /// Watches a kind that need not be there, under the first of two groups that serves it.
    async fn watch_optional<Spec: Part, T>(
        &self,
        kinds: [Kind; 2],
        read: &impl Fn(Object<Spec>) -> Option<T>,
        event: fn(News<T>) -> Event,
        out: &mpsc::Sender<Event>,
    ) {
        let mut before = None;
        while !out.is_closed() {
            let Some(served) = self.served(&kinds).await else {
                self.pause().await;
                continue;
            };
            if before != Some(served) {
                before = Some(served);
                let found = served.map(|kind| kind.group);
                tracing::info!(
                    kind = kinds[0].kind,
                    group = found.unwrap_or("none"),
                    "optional kind"
                );
            }
            let Some(kind) = served else {
                let nothing = [News::Begin, News::Complete];
                for news in nothing {
                    // Nobody listens: the loop ends by itself.
                    let _ = out.send(event(news)).await;
                }
                self.pause().await;
                continue;
            };
            tokio::select! {
                () = self.watch(kind, config(), read, event, out) => {}
                () = self.until_served_elsewhere(&kinds, kind) => {}
            }
        }
    }

    /// Returns when another group than that of `now` is the one to ask.
    async fn until_served_elsewhere(&self, kinds: &[Kind; 2], now: Kind) {
        loop {
            self.pause().await;
            if self
                .served(kinds)
                .await
                .is_some_and(|served| served != Some(now))
            {
                return;
            }
        }
    }

    /// The first of these kinds that is served; `None` if that could not be learnt.
    async fn served(&self, kinds: &[Kind; 2]) -> Option<Option<Kind>> {
        for kind in kinds {
            let version = format!("{}/{}", kind.group, kind.version);
            match self.client.list_api_group_resources(&version).await {
                Ok(list) if list.resources.iter().any(|r| r.name == kind.plural) => {
                    return Some(Some(*kind));
                }
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    tracing::debug!(kind = kind.kind, group = kind.group, %error, "is it served?");
                    return None;
                }
            }
        }
        Some(None)
    }

    async fn pause(&self) {
        tokio::time::sleep(shortened(self.pace.recheck, chance())).await;
    }
}

/// A part of an object.
trait Part: Clone + Debug + Default + DeserializeOwned + Send + 'static {}
impl<T: Clone + Debug + Default + DeserializeOwned + Send + 'static> Part for T {}

fn config() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_S)
}

/// Whether this event shows that list or watch work: a list that begins has not been answered yet.
fn settled<K>(event: &watcher::Event<K>) -> bool {
    !matches!(event, watcher::Event::Init)
}

fn news<Spec: Part, Status: Part, T>(
    event: watcher::Event<Object<Spec, Status>>,
    read: &impl Fn(Object<Spec, Status>) -> Option<T>,
) -> News<T> {
    match event {
        watcher::Event::Init => News::Begin,
        watcher::Event::InitDone => News::Complete,
        watcher::Event::Delete(object) => News::Remove(object.name_any()),
        watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
            News::Put(object.name_any(), read(object))
        }
    }
}

/// The status by which the API server refused, if it was the API server.
fn status(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, WatchError, WatchFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status))
        | WatchStartFailed(kube::Error::Api(status))
        | WatchFailed(kube::Error::Api(status))
        | WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// Says each trouble once, not at each try.
#[derive(Default)]
struct Trouble {
    told: Option<String>,
}

impl Trouble {
    fn tell(&mut self, kind: Kind, error: &watcher::Error) {
        let error = error.to_string();
        if self.told.as_ref() == Some(&error) {
            return;
        }
        tracing::warn!(
            kind = kind.kind,
            group = kind.group,
            error,
            "watching; what is known stays"
        );
        self.told = Some(error);
    }

    fn over(&mut self, kind: Kind) {
        if self.told.take().is_some() {
            tracing::info!(kind = kind.kind, group = kind.group, "watching again");
        }
    }
}
