//! Events: when asynchronous work is done, and whether it went well.

use crate::api::Api;
use crate::client::ClientHandle;
use crate::promise::{self, Receiver};
use crate::{Result, sys};
use std::cell::Cell;
use std::ffi::c_void;
use std::future::{Future, IntoFuture};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

thread_local! {
    /// Whether this thread is inside a callback that a plugin made.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is one of a plugin's own, calling us: a place where a client must not be destroyed, because
/// that joins the plugin's threads.
pub(crate) fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// The completion of asynchronous work. `await` it, wait for it, or leave a callback.
pub struct Event {
    raw: *mut sys::Event,
    /// The call that began the work, to name in errors.
    origin: &'static str,
    client: Arc<ClientHandle>,
}

// SAFETY: PJRT's contract lets an event be used and destroyed on any thread.
unsafe impl Send for Event {}
// SAFETY: all methods on a shared event only read its state or register callbacks, which the plugin synchronises.
unsafe impl Sync for Event {}

impl Event {
    /// # Safety
    /// `raw` is an event that a call named `origin` made for this client, and nobody else destroys.
    pub(crate) unsafe fn from_raw(
        raw: *mut sys::Event,
        origin: &'static str,
        client: &Arc<ClientHandle>,
    ) -> Self {
        Self {
            raw,
            origin,
            client: Arc::clone(client),
        }
    }

    /// Blocks until the work is done.
    ///
    /// # Errors
    /// The work failed.
    pub fn wait(&self) -> Result<()> {
        let mut args = sys::EventAwait {
            event: self.raw,
            ..sys::EventAwait::new()
        };
        // SAFETY: the event is alive while `self` is.
        unsafe { self.client.api().call_as(self.origin, &mut args) }
    }

    /// Whether the work is done, well or not.
    ///
    /// # Errors
    /// The plugin refuses to say.
    pub fn is_ready(&self) -> Result<bool> {
        let mut args = sys::EventIsReady {
            event: self.raw,
            ..sys::EventIsReady::new()
        };
        // SAFETY: the event is alive while `self` is.
        unsafe { self.client.api().call(&mut args) }?;
        Ok(args.is_ready)
    }

    /// Calls `then` with the outcome once the work is done: at once on this thread if it is done already, else on
    /// a thread of the plugin's. `then` must be quick; a panic in it goes no further.
    ///
    /// # Errors
    /// The plugin refuses; `then` is dropped without being called.
    pub fn on_ready(&self, then: impl FnOnce(Result<()>) + Send + 'static) -> Result<()> {
        self.register(then).map_err(|(error, _)| error)
    }

    /// As [`Event::on_ready`], but gives `then` back if it will never be called.
    pub(crate) fn register<F>(&self, then: F) -> std::result::Result<(), (crate::Error, F)>
    where
        F: FnOnce(Result<()>) + Send + 'static,
    {
        let api = Arc::clone(self.client.api());
        let callback = Box::into_raw(Box::new(Callback {
            api,
            origin: self.origin,
            then,
        }));
        let mut args = sys::EventOnReady {
            event: self.raw,
            callback: Some(call_back::<F>),
            user_arg: callback.cast(),
            ..sys::EventOnReady::new()
        };
        // SAFETY: the event is alive; the callback gets the box that it expects, and gets it once.
        unsafe { self.client.api().call(&mut args) }.map_err(|error| {
            // SAFETY: a refused callback is never called, so the box is still ours.
            let callback = unsafe { Box::from_raw(callback) };
            (error, callback.then)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let mut args = sys::EventDestroy {
            event: self.raw,
            ..sys::EventDestroy::new()
        };
        // SAFETY: the event is ours and not used again. Nobody is left to tell if it fails.
        let _ = unsafe { self.client.api().call(&mut args) };
    }
}

/// What [`call_back`] needs. Holds no client: the plugin's thread that drops it must not be the one to destroy the
/// client.
struct Callback<F> {
    api: Arc<Api>,
    origin: &'static str,
    then: F,
}

/// # Safety
/// `callback` is a leaked box of `Callback<F>` that nobody else frees, and `error` is null or the callee's to free.
unsafe extern "C" fn call_back<F: FnOnce(Result<()>)>(
    error: *mut sys::Error,
    callback: *mut c_void,
) {
    // SAFETY: `Event::register` leaked it for this one call.
    let callback = unsafe { Box::from_raw(callback.cast::<Callback<F>>()) };
    let Callback { api, origin, then } = *callback;
    // SAFETY: the plugin hands over the error.
    let outcome = unsafe { api.take_error(origin, error) };
    let before = IN_CALLBACK.replace(true);
    // A panic must not unwind into the plugin; there is nobody to hand it to.
    let _ = catch_unwind(AssertUnwindSafe(|| then(outcome)));
    IN_CALLBACK.set(before);
}

impl IntoFuture for Event {
    type Output = Result<()>;
    type IntoFuture = Completion;

    fn into_future(self) -> Completion {
        let (sender, receiver) = promise::channel();
        if let Err((error, then)) = self.register(move |outcome| sender.send(outcome)) {
            then(Err(error));
        }
        Completion(receiver)
    }
}

/// The future of an [`Event`]. Cancel safe: dropping it only loses the outcome.
pub struct Completion(Receiver<Result<()>>);

impl Future for Completion {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Table, client, live_errors, table, table_without_callbacks};
    use crate::{Client, Error};
    use std::sync::mpsc;
    use std::task::Waker;

    fn event(table: &Table) -> (Client, Event) {
        let client = client(table);
        // SAFETY: the made-up plugin never looks at its events.
        let event = unsafe { Event::from_raw(std::ptr::null_mut(), "PJRT_Begin", client.handle()) };
        (client, event)
    }

    fn poll(event: Event) -> Poll<Result<()>> {
        let mut future = event.into_future();
        Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn work_that_fails_later_is_reported_under_the_call_that_began_it() {
        let (_client, event) = event(&table());
        let text = "PJRT_Begin: data loss: chip lost";
        assert_eq!(event.wait().unwrap_err().to_string(), text);
        let (sender, outcome) = mpsc::channel();
        event
            .on_ready(move |result| sender.send(result).unwrap())
            .unwrap();
        assert_eq!(outcome.recv().unwrap().unwrap_err().to_string(), text);
        let Poll::Ready(Err(error)) = poll(event) else {
            panic!("the work is done")
        };
        assert_eq!(error.to_string(), text);
        assert_eq!(live_errors(), 0);
    }

    #[test]
    fn a_refused_callback_is_dropped_and_its_future_fails() {
        let (_client, event) = event(&table_without_callbacks());
        let (sender, outcome) = mpsc::channel::<Result<()>>();
        let error = event
            .on_ready(move |result| sender.send(result).unwrap())
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Call {
                    call: "PJRT_Event_OnReady",
                    ..
                }
            ),
            "{error}"
        );
        assert!(outcome.recv().is_err());
        let Poll::Ready(Err(error)) = poll(event) else {
            panic!("nothing will wake it")
        };
        assert!(error.to_string().contains("no callbacks"), "{error}");
        assert_eq!(live_errors(), 0);
    }
}
