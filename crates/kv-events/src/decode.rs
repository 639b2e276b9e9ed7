//! Batches of events, as vLLM and SGLang write them, read without trust in whoever sent them.
//!
//! Both forms of a batch and of an event are taken, each by itself. An event that makes no sense costs itself alone.

use baton_kv::{BlockEvent, EngineHash, Medium, Removed, Stored};

use crate::fields::{BATCH, CLEARED, OF_REMOVED, OF_STORED, REMOVED, STORED, TAG, WHOLE_PREFIX};
use crate::msgpack::{Head, Malformed, Reader};

/// What a server says at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// When it was said, in seconds since 1970 by the server's clock.
    pub ts: f64,
    /// What happened, in order.
    pub events: Vec<BlockEvent>,
    /// The data parallel rank whose cache it is about.
    pub rank: Option<u32>,
    /// Events that made no sense, and are not among the others.
    pub dropped: u32,
}

/// Bytes that are no batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a batch of KV events: {0}")]
pub struct DecodeError(Malformed);

impl From<Malformed> for DecodeError {
    fn from(why: Malformed) -> Self {
        Self(why)
    }
}

/// Groups of layers whose cache does not stand for whole prefixes, as far as a server's events have told. Removals name
/// the group alone, so whoever reads them must remember what was stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Groups {
    partial: u64,
}

impl Groups {
    fn learn(&mut self, group: u32, kind: Option<&str>) -> bool {
        let bit = 1_u64.checked_shl(group).unwrap_or(0);
        if kind.is_some_and(|kind| !WHOLE_PREFIX.contains(&kind)) {
            self.partial |= bit;
        }
        self.partial & bit == 0
    }

    fn counts(self, group: Option<u32>) -> bool {
        let bit = 1_u64.checked_shl(group.unwrap_or(0)).unwrap_or(0);
        self.partial & bit == 0
    }
}

/// Reads a batch. Events of groups that do not stand for prefixes are left out; `groups` remembers which those are.
///
/// # Errors
/// When the bytes are no batch at all.
pub fn decode(payload: &[u8], groups: &mut Groups) -> Result<Batch, DecodeError> {
    let mut reader = Reader::new(payload);
    let [ts, events, rank] = match reader.head()? {
        Head::Array(n) => fields_of_array(&mut reader, n)?,
        Head::Map(n) => fields_of_map(&mut reader, n, BATCH)?,
        _ => return Err(Malformed::Type.into()),
    };
    let mut events = events.ok_or(Malformed::Type)?;
    let n = events.array()?;
    let mut batch = Batch {
        ts: ts.ok_or(Malformed::Type)?.number_as_float()?,
        events: Vec::with_capacity(n.min(LIKELY_EVENTS)),
        rank: optional(rank, Reader::unsigned)?.and_then(|rank| u32::try_from(rank).ok()),
        dropped: 0,
    };
    for _ in 0..n {
        // Its bounds are known before it is looked at, so that the next one is found whatever is in it.
        match event(events.value()?, groups) {
            Ok(Some(event)) => batch.events.push(event),
            Ok(None) => {}
            Err(_) => batch.dropped += 1,
        }
    }
    Ok(batch)
}

/// Room that is made before any event is read.
const LIKELY_EVENTS: usize = 64;

type Field<'a> = Option<Reader<'a>>;

fn fields_of_array<'a, const N: usize>(
    reader: &mut Reader<'a>,
    n: usize,
) -> Result<[Field<'a>; N], Malformed> {
    let mut fields = [None; N];
    for i in 0..n {
        let value = reader.value()?;
        if let Some(field) = fields.get_mut(i) {
            *field = Some(value);
        }
    }
    Ok(fields)
}

fn fields_of_map<'a, const N: usize>(
    reader: &mut Reader<'a>,
    n: usize,
    keys: &[&str],
) -> Result<[Field<'a>; N], Malformed> {
    let mut fields = [None; N];
    for _ in 0..n {
        let (mut key, value) = (reader.value()?, reader.value()?);
        let Ok(key) = key.text() else { continue };
        if let Some(i) = keys.iter().position(|&known| known == key) {
            fields[i] = Some(value);
        }
    }
    Ok(fields)
}

/// A field that may be missing or nil.
fn optional<'a, T>(
    field: Field<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, Malformed>,
) -> Result<Option<T>, Malformed> {
    let Some(mut field) = field else {
        return Ok(None);
    };
    let mut ahead = field;
    if ahead.head()? == Head::Nil {
        return Ok(None);
    }
    read(&mut field).map(Some)
}

fn required<'a, T>(
    field: Field<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, Malformed>,
) -> Result<T, Malformed> {
    read(&mut field.ok_or(Malformed::Type)?)
}

/// `None`: an event about something that no prefix depends on, or of a kind that is not known here.
fn event(mut reader: Reader<'_>, groups: &mut Groups) -> Result<Option<BlockEvent>, Malformed> {
    let (tag, n, is_map) = match reader.head()? {
        Head::Array(n) if n > 0 => (reader.text()?, n - 1, false),
        Head::Map(n) => (tag_of_map(reader, n)?, n, true),
        _ => return Err(Malformed::Type),
    };
    match tag {
        STORED => {
            let fields = if is_map {
                fields_of_map(&mut reader, n, OF_STORED)?
            } else {
                fields_of_array(&mut reader, n)?
            };
            stored(fields, groups)
        }
        REMOVED => {
            let fields = if is_map {
                fields_of_map(&mut reader, n, OF_REMOVED)?
            } else {
                fields_of_array(&mut reader, n)?
            };
            removed(fields, *groups)
        }
        CLEARED => Ok(Some(BlockEvent::Cleared)),
        _ => Ok(None),
    }
}

fn tag_of_map<'a>(mut reader: Reader<'a>, n: usize) -> Result<&'a str, Malformed> {
    let [tag] = fields_of_map(&mut reader, n, &[TAG])?;
    required(tag, Reader::text)
}

fn stored(fields: [Field<'_>; 12], groups: &mut Groups) -> Result<Option<BlockEvent>, Malformed> {
    let [
        hashes,
        parent,
        tokens,
        block_size,
        lora_id,
        medium,
        lora_name,
        extra,
        group,
        kind,
        _,
        locality,
    ] = fields;
    let group = optional(group, u32_of)?;
    if !groups.learn(group.unwrap_or(0), optional(kind, Reader::text)?) {
        return Ok(None);
    }
    let name = optional(lora_name, |name| Ok(Box::from(name.text()?)))?;
    let stored = Stored {
        hashes: required(hashes, hashes_of)?,
        parent: optional(parent, hash_of)?,
        tokens: required(tokens, tokens_of)?,
        block_size: required(block_size, u32_of)?,
        extra: optional(extra, |extra| extra_of(extra, name.as_deref()))?.unwrap_or_default(),
        adapter: match name {
            Some(name) => Some(name),
            None => optional(lora_id, |id| Ok(id.unsigned()?.to_string().into()))?,
        },
        medium: medium_of(medium, locality)?,
        group,
    };
    let all = (stored.block_size as usize).checked_mul(stored.hashes.len());
    if !stored.tokens.is_empty() && all != Some(stored.tokens.len())
        || !stored.extra.is_empty() && stored.extra.len() != stored.hashes.len()
    {
        return Err(Malformed::Type);
    }
    Ok(Some(BlockEvent::Stored(stored)))
}

fn removed(fields: [Field<'_>; 4], groups: Groups) -> Result<Option<BlockEvent>, Malformed> {
    let [hashes, medium, group, locality] = fields;
    let group = optional(group, u32_of)?;
    if !groups.counts(group) {
        return Ok(None);
    }
    Ok(Some(BlockEvent::Removed(Removed {
        hashes: required(hashes, hashes_of)?,
        medium: medium_of(medium, locality)?,
        group,
    })))
}

fn u32_of(reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    u32::try_from(reader.unsigned()?).map_err(|_| Malformed::Type)
}

fn hash_of(reader: &mut Reader<'_>) -> Result<EngineHash, Malformed> {
    Ok(match reader.head()? {
        Head::Unsigned(n) => EngineHash(n),
        Head::Negative(n) => EngineHash(n.cast_unsigned()),
        Head::Binary(n) => EngineHash::from_bytes(reader.bytes(n)?),
        _ => return Err(Malformed::Type),
    })
}

fn hashes_of(reader: &mut Reader<'_>) -> Result<Vec<EngineHash>, Malformed> {
    let n = reader.array()?;
    (0..n).map(|_| hash_of(reader)).collect()
}

fn tokens_of(reader: &mut Reader<'_>) -> Result<Vec<u32>, Malformed> {
    let n = reader.array()?;
    let mut tokens = Vec::with_capacity(n.min(reader.most()));
    for _ in 0..n {
        tokens.push(u32_of(reader)?);
    }
    Ok(tokens)
}

/// Where the blocks are: by name, unless they are not even on the server.
fn medium_of(medium: Field<'_>, locality: Field<'_>) -> Result<Medium, Malformed> {
    if optional(locality, Reader::text)?.is_some_and(|word| word.eq_ignore_ascii_case("remote")) {
        return Ok(Medium::Other);
    }
    let Some(name) = optional(medium, Reader::text)? else {
        return Ok(Medium::Device);
    };
    let is_one_of = |names: &[&str]| names.iter().any(|known| name.eq_ignore_ascii_case(known));
    Ok(if is_one_of(&["", "GPU", "TPU", "HBM", "DEVICE"]) {
        Medium::Device
    } else if is_one_of(&["CPU", "CPU_PINNED", "HOST", "DRAM"]) {
        Medium::Host
    } else {
        Medium::Other
    })
}

/// One list a block, without the adapter's name, which vLLM has there as well; nothing if all are empty.
fn extra_of(
    reader: &mut Reader<'_>,
    adapter: Option<&str>,
) -> Result<Vec<Vec<Box<str>>>, Malformed> {
    let n = reader.array()?;
    let mut extra = Vec::new();
    for _ in 0..n {
        let mut keys = Vec::new();
        let value = reader.value()?;
        if let Some(mut list) = optional(Some(value), |value| Ok(*value))? {
            for _ in 0..list.array()? {
                keys.push(key_of(list.value()?)?);
            }
        }
        if adapter.is_some() && keys.first().map(AsRef::as_ref) == adapter {
            keys.remove(0);
        }
        extra.push(keys);
    }
    if extra.iter().all(Vec::is_empty) {
        extra.clear();
    }
    Ok(extra)
}

/// A key as text. Of one that says where in the block an image lies, too, the image counts.
fn key_of(mut reader: Reader<'_>) -> Result<Box<str>, Malformed> {
    let whole = reader;
    Ok(match reader.head()? {
        Head::Text(_) => Box::from({ whole }.text()?),
        Head::Binary(n) => hex(reader.bytes(n)?),
        Head::Unsigned(n) => n.to_string().into(),
        Head::Negative(n) => n.to_string().into(),
        Head::Array(n) if n > 0 => {
            let first = reader.value()?;
            let mut ahead = first;
            match ahead.head()? {
                Head::Array(_) => return Err(Malformed::Type),
                _ => return key_of(first),
            }
        }
        _ => return Err(Malformed::Type),
    })
}

fn hex(bytes: &[u8]) -> Box<str> {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
