//! A value that a plugin's thread delivers once: to be polled, waited for, or forgotten.
//!
//! Invariant: dropping the receiving end never blocks and never frees what the plugin still uses.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

enum State<T> {
    Pending(Option<Waker>),
    Ready(T),
    Taken,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    delivered: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under the lock, but for wakers' `clone` and `drop`: the state stays whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The delivering end.
pub(crate) struct Sender<T>(Arc<Shared<T>>);

/// The receiving end.
pub(crate) struct Receiver<T>(Arc<Shared<T>>);

pub(crate) fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State::Pending(None)),
        delivered: Condvar::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    pub(crate) fn send(self, value: T) {
        let before = std::mem::replace(&mut *self.0.lock(), State::Ready(value));
        self.0.delivered.notify_one();
        if let State::Pending(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// Blocks until the value is there.
    pub(crate) fn wait(self) -> T {
        let mut state = self.0.lock();
        loop {
            match std::mem::replace(&mut *state, State::Taken) {
                State::Ready(value) => return value,
                pending => *state = pending,
            }
            state = self
                .0
                .delivered
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(*self.0.lock(), State::Ready(_))
    }
}

impl<T> Future for Receiver<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Ready(value) => Poll::Ready(value),
            State::Pending(_) => {
                *state = State::Pending(Some(cx.waker().clone()));
                Poll::Pending
            }
            State::Taken => panic!("polled after completion"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_sent_from_another_thread_ends_the_wait() {
        let (sender, receiver) = channel();
        let thread = std::thread::spawn(move || sender.send(7));
        assert_eq!(receiver.wait(), 7);
        thread.join().unwrap();
    }

    #[test]
    fn a_poll_before_the_value_is_woken_by_it() {
        struct Count(std::sync::atomic::AtomicUsize);
        impl std::task::Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let count = Arc::new(Count(0.into()));
        let waker = Waker::from(Arc::clone(&count));
        let mut cx = Context::from_waker(&waker);
        let (sender, mut receiver) = channel();
        assert!(Pin::new(&mut receiver).poll(&mut cx).is_pending());
        assert!(!receiver.is_ready());
        sender.send("done");
        assert_eq!(count.0.load(std::sync::atomic::Ordering::SeqCst), 1);
        assert_eq!(Pin::new(&mut receiver).poll(&mut cx), Poll::Ready("done"));
    }
}
