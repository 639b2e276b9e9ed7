//! Values with a number each; numbers are used again, and a handle tells whether its value is still the one meant.

use std::ops::{Index, IndexMut};

/// Names a value of a slab for as long as it is there; afterwards it names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle {
    index: u32,
    generation: u32,
}

#[derive(Debug)]
struct Slot<V> {
    generation: u32,
    value: Option<V>,
}

#[derive(Debug)]
pub(super) struct Slab<V> {
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
}

impl<V> Default for Slab<V> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<V> Slab<V> {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Slots there are, used or not.
    #[cfg(test)]
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn insert(&mut self, value: V) -> u32 {
        if let Some(index) = self.free.pop() {
            self.slots[index as usize].value = Some(value);
            return index;
        }
        let index = u32::try_from(self.slots.len()).expect("bounded far below 2^32 by the caller");
        self.slots.push(Slot {
            generation: 0,
            value: Some(value),
        });
        index
    }

    /// Takes out the value at `index`, which is there.
    pub(super) fn remove(&mut self, index: u32) -> V {
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        slot.value.take().expect("removed once")
    }

    pub(super) fn handle(&self, index: u32) -> Handle {
        let generation = self.slots[index as usize].generation;
        Handle { index, generation }
    }

    /// The number of what `handle` names, if it is still there.
    pub(super) fn find(&self, handle: Handle) -> Option<u32> {
        let slot = self.slots.get(handle.index as usize)?;
        (slot.generation == handle.generation && slot.value.is_some()).then_some(handle.index)
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &V> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }
}

impl<V> Index<u32> for Slab<V> {
    type Output = V;

    fn index(&self, index: u32) -> &V {
        let value = self.slots[index as usize].value.as_ref();
        value.expect("a number is kept as long as its value")
    }
}

impl<V> IndexMut<u32> for Slab<V> {
    fn index_mut(&mut self, index: u32) -> &mut V {
        let value = self.slots[index as usize].value.as_mut();
        value.expect("a number is kept as long as its value")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_names_one_value_only() {
        let mut slab = Slab::default();
        let a = slab.insert('a');
        let handle = slab.handle(a);
        assert_eq!(slab.find(handle), Some(a));
        assert_eq!(slab.remove(a), 'a');
        assert_eq!(slab.find(handle), None);
        let b = slab.insert('b');
        assert_eq!((b, slab.find(handle), slab.len()), (a, None, 1));
        assert_eq!(slab.iter().collect::<Vec<_>>(), [&'b']);
    }
}
