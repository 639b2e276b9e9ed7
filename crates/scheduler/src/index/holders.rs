//! Who holds one block, and on which tier: one server in place, a few in a list, many as bits.

/// A place in the table of servers.
pub(super) type Slot = u16;

/// Servers that a list has room for.
const FEW: usize = 20;

/// The tiers on which a server holds a block, as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tiers(pub(super) u8);

impl Tiers {
    /// In the accelerator's memory.
    pub(super) const DEVICE: Self = Self(1);
    /// In the host's memory.
    pub(super) const HOST: Self = Self(2);
    /// Further away.
    pub(super) const OTHER: Self = Self(4);

    pub(super) fn has(self, tier: Self) -> bool {
        self.0 & tier.0 != 0
    }
}

/// Who holds a block.
#[derive(Debug, Default)]
pub(super) enum Holders {
    #[default]
    Nobody,
    One(Slot, Tiers),
    Few(Box<Few>),
    Many(Box<Many>),
}

#[derive(Debug)]
pub(super) struct Few {
    len: u8,
    slots: [Slot; FEW],
    tiers: [Tiers; FEW],
}

/// One set of servers for each tier, as long as it has to be.
#[derive(Debug, Default)]
pub(super) struct Many {
    device: Vec<u64>,
    host: Vec<u64>,
    other: Vec<u64>,
}

/// Sets of servers: those that hold something on any tier, and those that hold it in the accelerator's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sets {
    pub(super) any: Vec<u64>,
    pub(super) device: Vec<u64>,
}

impl Few {
    fn place_of(&self, slot: Slot) -> Option<usize> {
        self.slots[..self.len.into()]
            .iter()
            .position(|&s| s == slot)
    }

    fn iter(&self) -> impl Iterator<Item = (Slot, Tiers)> {
        (self.slots.iter().copied().zip(self.tiers.iter().copied())).take(self.len.into())
    }
}

impl Many {
    fn tiers_of(&self, slot: Slot) -> Tiers {
        let bit = |set: &[u64], tier: Tiers| if contains(set, slot) { tier.0 } else { 0 };
        Tiers(
            bit(&self.device, Tiers::DEVICE)
                | bit(&self.host, Tiers::HOST)
                | bit(&self.other, Tiers::OTHER),
        )
    }

    fn set(&mut self, slot: Slot, tiers: Tiers) {
        for (set, tier) in [
            (&mut self.device, Tiers::DEVICE),
            (&mut self.host, Tiers::HOST),
            (&mut self.other, Tiers::OTHER),
        ] {
            if tiers.has(tier) {
                add(set, slot);
            } else if let Some(word) = set.get_mut(usize::from(slot) / 64) {
                *word &= !(1 << (slot % 64));
            }
        }
    }

    fn is_empty(&self) -> bool {
        [&self.device, &self.host, &self.other]
            .iter()
            .all(|set| set.iter().all(|&word| word == 0))
    }
}

impl Holders {
    /// The tiers on which the server at `slot` holds the block.
    pub(super) fn tiers_of(&self, slot: Slot) -> Tiers {
        match self {
            Self::One(s, tiers) if *s == slot => *tiers,
            Self::Nobody | Self::One(..) => Tiers::default(),
            Self::Few(few) => few
                .place_of(slot)
                .map_or(Tiers::default(), |at| few.tiers[at]),
            Self::Many(many) => many.tiers_of(slot),
        }
    }

    /// From now on the server at `slot` holds the block on `tiers`.
    pub(super) fn set(&mut self, slot: Slot, tiers: Tiers) {
        let gone = tiers == Tiers::default();
        match self {
            Self::One(s, t) if *s == slot => *t = tiers,
            Self::Many(many) => many.set(slot, tiers),
            Self::Few(few) => match few.place_of(slot) {
                Some(at) => {
                    few.tiers[at] = tiers;
                    if gone {
                        let last = usize::from(few.len) - 1;
                        few.slots.swap(at, last);
                        few.tiers.swap(at, last);
                        few.len -= 1;
                    }
                }
                None if gone => {}
                None if usize::from(few.len) < FEW => {
                    let at = usize::from(few.len);
                    (few.slots[at], few.tiers[at]) = (slot, tiers);
                    few.len += 1;
                }
                None => {
                    let mut many = Many::default();
                    (few.iter().chain([(slot, tiers)])).for_each(|(s, t)| many.set(s, t));
                    *self = Self::Many(Box::new(many));
                }
            },
            Self::Nobody | Self::One(..) if gone => {}
            Self::Nobody => *self = Self::One(slot, tiers),
            Self::One(first, its) => {
                let mut few = Few {
                    len: 2,
                    slots: [0; FEW],
                    tiers: [Tiers::default(); FEW],
                };
                few.slots[..2].copy_from_slice(&[*first, slot]);
                few.tiers[..2].copy_from_slice(&[*its, tiers]);
                *self = Self::Few(Box::new(few));
            }
        }
        if gone && self.is_empty() {
            *self = Self::Nobody;
        }
    }

    /// Whether nobody holds it.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Nobody => true,
            Self::One(_, tiers) => *tiers == Tiers::default(),
            Self::Few(few) => few.len == 0,
            Self::Many(many) => many.is_empty(),
        }
    }

    /// Memory beside the value itself, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Nobody | Self::One(..) => 0,
            Self::Few(_) => size_of::<Few>(),
            Self::Many(many) => {
                let words = many.device.capacity() + many.host.capacity() + many.other.capacity();
                size_of::<Many>() + words * size_of::<u64>()
            }
        }
    }

    /// Writes to `narrowed` those servers of `of` that hold the block.
    pub(super) fn narrow(&self, of: &Sets, narrowed: &mut Sets) {
        if let Self::Many(many) = self {
            for (i, (any, device)) in
                (narrowed.any.iter_mut().zip(&mut narrowed.device)).enumerate()
            {
                let word = |set: &[u64]| set.get(i).copied().unwrap_or(0);
                let on_device = word(&many.device);
                *any = of.any[i] & (on_device | word(&many.host) | word(&many.other));
                *device = of.device[i] & on_device;
            }
            return;
        }
        narrowed.any.fill(0);
        narrowed.device.fill(0);
        let mut keep = |slot: Slot, tiers: Tiers| {
            if contains(&of.any, slot) {
                add(&mut narrowed.any, slot);
            }
            if tiers.has(Tiers::DEVICE) && contains(&of.device, slot) {
                add(&mut narrowed.device, slot);
            }
        };
        match self {
            Self::One(slot, tiers) => keep(*slot, *tiers),
            Self::Few(few) => few.iter().for_each(|(slot, tiers)| keep(slot, tiers)),
            Self::Nobody | Self::Many(_) => {}
        }
    }
}

/// Adds a server to a set, lengthening it as needed.
pub(super) fn add(set: &mut Vec<u64>, slot: Slot) {
    let word = usize::from(slot) / 64;
    if set.len() <= word {
        set.resize(word + 1, 0);
    }
    set[word] |= 1 << (slot % 64);
}

/// Whether a server is in a set.
pub(super) fn contains(set: &[u64], slot: Slot) -> bool {
    set.get(usize::from(slot) / 64)
        .is_some_and(|word| word >> (slot % 64) & 1 == 1)
}

/// The members of a set that are not in `without`, which is no longer.
pub(super) fn missing<'a>(set: &'a [u64], without: &'a [u64]) -> impl Iterator<Item = Slot> + 'a {
    set.iter().enumerate().flat_map(move |(i, &word)| {
        let mut rest = word & !without.get(i).copied().unwrap_or(0);
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Slot::try_from(i * 64 + bit as usize).ok()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn holders_are_a_map_in_every_form(ops in prop::collection::vec((0u16..150, 0u8..8), 0..120)) {
            let (mut holders, mut map) = (Holders::default(), BTreeMap::new());
            for (slot, tiers) in ops {
                holders.set(slot, Tiers(tiers));
                map.insert(slot, tiers);
                map.retain(|_, t| *t != 0);
                prop_assert_eq!(holders.is_empty(), map.is_empty());
            }
            let all = Sets { any: vec![u64::MAX; 3], device: vec![u64::MAX; 3] };
            let mut now = all.clone();
            holders.narrow(&all, &mut now);
            for slot in 0..150 {
                let tiers = map.get(&slot).copied().unwrap_or(0);
                prop_assert_eq!(holders.tiers_of(slot), Tiers(tiers));
                prop_assert_eq!(contains(&now.any, slot), tiers != 0);
                prop_assert_eq!(contains(&now.device, slot), tiers & 1 != 0);
            }
            let out: Vec<Slot> = missing(&all.any, &now.any).filter(|s| *s < 150).collect();
            let expected: Vec<Slot> = (0..150).filter(|s| !map.contains_key(s)).collect();
            prop_assert_eq!(out, expected);
        }
    }
}
