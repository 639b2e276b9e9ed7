//! Series by model, tenant and priority: a client may make up any number of names, and only so many get labels.

use crate::{Names, OTHER};
use parking_lot::Mutex;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// Priorities are an operator's, but there may be many tenants for each: series in all.
const MAX_SERIES: usize = 10_000;

/// Whose requests a series is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whose<'a> {
    /// The model that clients ask for.
    pub model: &'a str,
    /// The one that servers are asked for.
    pub target: &'a str,
    /// Who asks.
    pub tenant: &'a str,
    /// How important that is.
    pub priority: i32,
}

/// Names that have labels of their own, and their series. Finding those of a request that is like another costs no
/// allocation.
#[derive(Debug)]
pub struct Known<S> {
    models: Names,
    tenants: Names,
    made: Mutex<HashMap<Key<'static>, Arc<S>>>,
    /// Of all requests whose own would be one too many.
    rest: OnceLock<Arc<S>>,
}

/// What tells series apart: owned where they are kept, borrowed where they are looked for.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key<'a> {
    model: Cow<'a, str>,
    target: Cow<'a, str>,
    tenant: Cow<'a, str>,
    priority: i32,
}

impl<'a> Key<'a> {
    fn of(whose: Whose<'a>) -> Self {
        Self {
            model: whose.model.into(),
            target: whose.target.into(),
            tenant: whose.tenant.into(),
            priority: whose.priority,
        }
    }

    fn into_owned(self) -> Key<'static> {
        let own = |text: Cow<'a, str>| Cow::Owned(text.into_owned());
        Key {
            model: own(self.model),
            target: own(self.target),
            tenant: own(self.tenant),
            priority: self.priority,
        }
    }
}

impl<S> Default for Known<S> {
    fn default() -> Self {
        Self {
            models: Names::default(),
            tenants: Names::default(),
            made: Mutex::default(),
            rest: OnceLock::new(),
        }
    }
}

impl<S> Known<S> {
    /// The series of such requests. If there are none yet, `make` makes them of their labels: model, target, tenant and
    /// priority.
    pub fn series(&self, whose: Whose<'_>, make: impl FnOnce([&str; 4]) -> S) -> Arc<S> {
        let mut made = self.made.lock();
        if let Some(series) = find(&made, &Key::of(whose)) {
            return series;
        }
        let bounded = Whose {
            model: self.models.label(whose.model),
            target: self.models.label(whose.target),
            tenant: self.tenants.label(whose.tenant),
            priority: whose.priority,
        };
        let key = Key::of(bounded);
        if let Some(series) = find(&made, &key) {
            return series;
        }
        if made.len() >= MAX_SERIES {
            return (self.rest)
                .get_or_init(|| Arc::new(make([OTHER; 4])))
                .clone();
        }
        let priority = bounded.priority.to_string();
        let labels = [bounded.model, bounded.target, bounded.tenant, &priority];
        let series = Arc::new(make(labels));
        made.insert(key.into_owned(), series.clone());
        series
    }

    /// The label that a model's name gets.
    pub fn model<'a>(&self, name: &'a str) -> &'a str {
        self.models.label(name)
    }
}

fn find<'a, S>(made: &HashMap<Key<'a>, Arc<S>>, key: &Key<'a>) -> Option<Arc<S>> {
    made.get(key).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Series that are no more than their labels.
    type Labels = [String; 4];

    fn series(known: &Known<Labels>, model: &str, tenant: &str, priority: i32) -> Arc<Labels> {
        let whose = Whose {
            model,
            target: "t",
            tenant,
            priority,
        };
        known.series(whose, |labels| labels.map(str::to_owned))
    }

    #[test]
    fn requests_that_are_alike_share_their_series() {
        let known = Known::default();
        let of = |tenant, priority| series(&known, "m", tenant, priority);
        assert!(Arc::ptr_eq(&of("a", 0), &of("a", 0)));
        assert!(!Arc::ptr_eq(&of("a", 0), &of("b", 0)) && !Arc::ptr_eq(&of("a", 0), &of("a", 1)));
        assert_eq!(*of("a", -1), ["m", "t", "a", "-1"]);
    }

    #[test]
    fn names_that_clients_make_up_end_in_one_series() {
        let known = Known::default();
        for i in 0..2000 {
            series(&known, &i.to_string(), "a", 0);
        }
        assert_eq!(*series(&known, "7", "a", 0), ["7", "t", "a", "0"]);
        let other = series(&known, "one more", "a", 0);
        assert_eq!(*other, [OTHER, "t", "a", "0"]);
        assert!(Arc::ptr_eq(&other, &series(&known, "1999", "a", 0)));
        assert!(known.made.lock().len() <= 1001);
    }

    #[test]
    fn series_end_where_priorities_do_not() {
        let known = Known::default();
        for priority in 0..i32::try_from(MAX_SERIES).unwrap() {
            series(&known, "m", "a", priority);
        }
        let rest = series(&known, "m", "a", -1);
        assert_eq!(*rest, [OTHER; 4]);
        assert!(Arc::ptr_eq(&rest, &series(&known, "m", "a", -2)));
    }
}
