//! A binary heap whose entries know where they are, so that any of them can be taken out or moved.
//!
//! The heap does not own what it orders: entries are numbers, and `place` is told where each of them ends up.

/// What entries are ordered by: the smallest first. Both halves together are unique.
pub(super) type Key = (u64, u64);

/// Entries in order.
#[derive(Debug, Default)]
pub(super) struct Heap {
    entries: Vec<(Key, u32)>,
}

impl Heap {
    /// The smallest key and whose it is.
    pub(super) fn first(&self) -> Option<(Key, u32)> {
        self.entries.first().copied()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn push(&mut self, key: Key, id: u32, mut place: impl FnMut(u32, u32)) {
        self.entries.push((key, id));
        self.rise(self.entries.len() - 1, &mut place);
    }

    /// Takes out the entry at `at`.
    pub(super) fn remove(&mut self, at: u32, mut place: impl FnMut(u32, u32)) {
        let at = at as usize;
        self.entries.swap_remove(at);
        if at < self.entries.len() {
            self.settle(at, &mut place);
        }
    }

    /// Gives the entry at `at` another key.
    pub(super) fn update(&mut self, at: u32, key: Key, mut place: impl FnMut(u32, u32)) {
        let at = at as usize;
        if self.entries[at].0 != key {
            self.entries[at].0 = key;
            self.settle(at, &mut place);
        }
    }

    fn settle(&mut self, at: usize, place: &mut impl FnMut(u32, u32)) {
        if self.rise(at, place) == at {
            self.sink(at, place);
        }
    }

    /// Moves the entry at `at` towards the top; returns where it ends.
    fn rise(&mut self, mut at: usize, place: &mut impl FnMut(u32, u32)) -> usize {
        while at > 0 {
            let above = (at - 1) / 2;
            if self.entries[above].0 <= self.entries[at].0 {
                break;
            }
            self.swap(above, at, place);
            at = above;
        }
        self.tell(at, place);
        at
    }

    fn sink(&mut self, mut at: usize, place: &mut impl FnMut(u32, u32)) {
        loop {
            let below = [2 * at + 1, 2 * at + 2];
            let below = below.into_iter().filter(|&i| i < self.entries.len());
            let Some(least) = below.min_by_key(|&i| self.entries[i].0) else {
                break;
            };
            if self.entries[at].0 <= self.entries[least].0 {
                break;
            }
            self.swap(at, least, place);
            at = least;
        }
        self.tell(at, place);
    }

    /// `moving` is told of by whoever moves it on.
    fn swap(&mut self, a: usize, b: usize, place: &mut impl FnMut(u32, u32)) {
        self.entries.swap(a, b);
        self.tell(a, place);
        self.tell(b, place);
    }

    fn tell(&self, at: usize, place: &mut impl FnMut(u32, u32)) {
        place(self.entries[at].1, at as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        /// Numbers 0 to 9 are put in (again: moved) and taken out; a map does the same.
        #[test]
        fn a_heap_is_an_ordered_set(steps in prop::collection::vec((0u32..10, prop::option::of(0u64..20)), 0..200)) {
            let mut heap = Heap::default();
            let mut places = [u32::MAX; 10];
            let mut model = BTreeMap::new();
            for (id, key) in steps {
                let known = model.contains_key(&id);
                let at = places[id as usize];
                let place = |id: u32, at: u32| places[id as usize] = at;
                match key {
                    Some(key) if known => heap.update(at, (key, id.into()), place),
                    Some(key) => heap.push((key, id.into()), id, place),
                    None if known => heap.remove(at, place),
                    None => continue,
                }
                match key {
                    Some(key) => model.insert(id, (key, u64::from(id))),
                    None => model.remove(&id),
                };
                prop_assert_eq!(heap.len(), model.len());
                let least = model.iter().map(|(&id, &key)| (key, id)).min();
                prop_assert_eq!(heap.first(), least);
                for (&id, &key) in &model {
                    prop_assert_eq!(heap.entries[places[id as usize] as usize], (key, id));
                }
            }
        }
    }
}
