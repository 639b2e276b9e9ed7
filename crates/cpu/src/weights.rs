//! Weights: read as they lie in the model's file, packed once, and kept in a file that all processes map.

use crate::OpenError;
use crate::matrix::{Bytes, Matrix, ROWS, pack_tile, padded, tile_bytes};
use crate::plan::Plan;
use crate::shared::Shared;
use baton_model::Storage;
use memmap2::{Advice, Mmap, MmapMut};
use rayon::prelude::*;
use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A model's weights by their Hugging Face names, as they lie in its files. Called from several threads at a time.
pub trait Weights: Sync {
    /// How a weight is stored.
    ///
    /// # Errors
    /// There is no such weight.
    fn storage(&self, name: &str) -> Result<Storage, Box<dyn Error + Send + Sync>>;

    /// Reads a weight's rows in Hugging Face's order.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&self, name: &str) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>>;
}

/// Where packed weights are kept from start to start.
#[derive(Clone, Debug)]
pub struct WeightCache {
    /// The folder.
    pub folder: PathBuf,
    /// Tells this model's file from all others.
    pub key: String,
}

/// Bytes before the weights of a packed file.
const HEADER: usize = 4096;
/// Grows whenever packing changes.
const VERSION: u32 = 1;
/// Alignment of each matrix in a packed file.
const ALIGN: usize = 4096;

/// A matrix to be packed, and its place.
struct Packing {
    name: String,
    storage: Storage,
    dims: [usize; 2],
    place: Range<usize>,
}

/// All matrices and vectors of a plan, in its order.
pub(crate) fn load(
    plan: &Plan,
    weights: &dyn Weights,
    cache: Option<&WeightCache>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(Vec<Matrix>, Vec<Vec<f32>>), OpenError> {
    let (packings, len) = places(plan, weights)?;
    let home: Arc<dyn Bytes> = match cache {
        Some(cache) => Arc::new(kept(cache, &packings, len, weights, progress)?),
        None => {
            let mut memory = Shared::zeroed(len);
            pack(&packings, memory.all(), weights, progress)?;
            Arc::new(Memory(memory))
        }
    };
    progress(len, len);
    let matrix = |p: Packing| Matrix::new(p.storage, p.dims, Arc::clone(&home), p.place);
    let matrices = packings.into_iter().map(matrix).collect();
    let vectors: Result<_, _> = plan
        .vectors
        .iter()
        .map(|vector| read_vector(weights, &vector.name, vector.len))
        .collect();
    Ok((matrices, vectors?))
}

fn failed(name: &str, source: Box<dyn Error + Send + Sync>) -> OpenError {
    OpenError::Weight {
        name: name.to_owned(),
        source,
    }
}

fn places(plan: &Plan, weights: &dyn Weights) -> Result<(Vec<Packing>, usize), OpenError> {
    let mut end = HEADER;
    let mut packings = Vec::with_capacity(plan.matrices.len());
    for matrix in &plan.matrices {
        let storage = weights
            .storage(&matrix.name)
            .map_err(|source| failed(&matrix.name, source))?;
        let len = matrix.n_out.div_ceil(ROWS) * tile_bytes(storage, matrix.n_in);
        packings.push(Packing {
            name: matrix.name.clone(),
            storage,
            dims: [matrix.n_out, matrix.n_in],
            place: end..end + len,
        });
        end = (end + len).next_multiple_of(ALIGN);
    }
    Ok((packings, end))
}

fn pack(
    packings: &[Packing],
    out: &mut [u8],
    weights: &dyn Weights,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), OpenError> {
    let (done, total) = (AtomicUsize::new(0), out.len());
    let mut rest = out;
    let mut at = 0;
    let mut parts = Vec::with_capacity(packings.len());
    for packing in packings {
        let (_, after) = rest.split_at_mut(packing.place.start - at);
        let (part, after) = after.split_at_mut(packing.place.len());
        (rest, at) = (after, packing.place.end);
        parts.push((packing, part));
    }
    parts
        .into_par_iter()
        .with_max_len(1)
        .try_for_each(|(packing, part)| {
            pack_one(packing, part, weights)?;
            let so_far = done.fetch_add(part.len(), Ordering::Relaxed) + part.len();
            progress(so_far, total);
            Ok(())
        })
}

fn pack_one(packing: &Packing, out: &mut [u8], weights: &dyn Weights) -> Result<(), OpenError> {
    let Packing {
        name,
        storage,
        dims: [n_out, n_in],
        ..
    } = packing;
    let bytes = weights.read(name).map_err(|source| failed(name, source))?;
    let row_bytes = storage.bytes_of(*n_in).unwrap_or(0);
    if row_bytes == 0 || bytes.len() != n_out * row_bytes {
        let found = bytes.len();
        return Err(failed(
            name,
            format!("{found} bytes for {n_out} rows of {n_in}").into(),
        ));
    }
    let tiles = out.chunks_exact_mut(tile_bytes(*storage, *n_in));
    for (tile, rows) in tiles.zip(bytes.chunks(ROWS * row_bytes)) {
        let rows: Vec<&[u8]> = rows.chunks_exact(row_bytes).collect();
        pack_tile(*storage, &rows, tile);
    }
    Ok(())
}

fn read_vector(weights: &dyn Weights, name: &str, len: usize) -> Result<Vec<f32>, OpenError> {
    let storage = weights
        .storage(name)
        .map_err(|source| failed(name, source))?;
    let bytes = weights.read(name).map_err(|source| failed(name, source))?;
    if storage.bytes_of(len) != Some(bytes.len()) {
        return Err(failed(name, format!("{} bytes", bytes.len()).into()));
    }
    let mut vector = vec![0.0; padded(len)];
    storage.dequantize(&bytes, &mut vector[..len]);
    Ok(vector)
}

/// The packed file, made first if it is not there yet.
fn kept(
    cache: &WeightCache,
    packings: &[Packing],
    len: usize,
    weights: &dyn Weights,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Mapped, OpenError> {
    std::fs::create_dir_all(&cache.folder).map_err(|e| OpenError::cache(&cache.folder, e))?;
    let path = cache.folder.join(format!("{}.weights", cache.key));
    let in_file = |e| OpenError::cache(&path, e);
    let header = header(packings, len);
    if let Some(mapped) = open(&path, &header, len) {
        return Ok(mapped);
    }
    // One process packs, the others wait for it and find the file.
    let lock = File::create(cache.folder.join(format!("{}.lock", cache.key))).map_err(in_file)?;
    lock.lock().map_err(in_file)?;
    if let Some(mapped) = open(&path, &header, len) {
        return Ok(mapped);
    }
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let made = make(&unfinished, &header, packings, len, weights, progress)
        .and_then(|()| std::fs::rename(&unfinished, &path).map_err(in_file));
    if made.is_err() {
        // What is half done helps nobody; the error that matters is the first one.
        drop(std::fs::remove_file(&unfinished));
    }
    made?;
    open(&path, &header, len).ok_or_else(|| in_file(std::io::ErrorKind::InvalidData.into()))
}

/// What a packed file begins with: all that its reading depends on.
fn header(packings: &[Packing], len: usize) -> [u8; HEADER] {
    use sha2::{Digest as _, Sha256};
    let mut sha = Sha256::new();
    for p in packings {
        sha.update(format!(
            "{} {:?} {:?} {:?}\n",
            p.name, p.storage, p.dims, p.place
        ));
    }
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(b"batonwts");
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&(len as u64).to_le_bytes());
    header[32..64].copy_from_slice(&sha.finalize());
    header
}

#[expect(unsafe_code, reason = "mapping a file is unsafe: see the comment")]
fn make(
    path: &Path,
    header: &[u8; HEADER],
    packings: &[Packing],
    len: usize,
    weights: &dyn Weights,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), OpenError> {
    let in_file = |e| OpenError::cache(path, e);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(in_file)?;
    // All of the file's blocks are there before the map is written to: a full disk is an error here, not a signal there.
    allocate(&mut file, len).map_err(in_file)?;
    // SAFETY: the name is this process's own, and it holds the lock: nobody else changes the file.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(in_file)?;
    pack(packings, &mut map, weights, progress)?;
    map[..HEADER].copy_from_slice(header);
    map.flush().map_err(in_file)?;
    drop(map);
    forget(&file);
    Ok(())
}

/// Lets go of the file's pages in memory, which were made one by one: read again, they come in large ones.
fn forget(file: &File) {
    let all = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    if let Err(error) = all {
        tracing::debug!("weights stay in small pages: {error}");
    }
}

fn allocate(file: &mut File, len: usize) -> std::io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut left = len;
    while left > 0 {
        let n = left.min(zeros.len());
        file.write_all(&zeros[..n])?;
        left -= n;
    }
    Ok(())
}

/// A finished packed file that begins as it should.
#[expect(unsafe_code, reason = "mapping a file is unsafe: see the comment")]
fn open(path: &Path, header: &[u8; HEADER], len: usize) -> Option<Mapped> {
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() != len as u64 {
        return None;
    }
    // SAFETY: finished files get their name by renaming and are never written again; the folder belongs to the user who
    // runs this process, and is as trusted as the program itself.
    let map = unsafe { Mmap::map(&file) }.ok()?;
    // With pages of 4 KB a processor reads weights a third slower. Not every system has larger ones for files.
    if let Err(error) = map.advise(Advice::HugePage) {
        tracing::debug!("weights are in small pages: {error}");
    }
    (map[..HEADER] == header[..]).then_some(Mapped(map))
}

struct Mapped(Mmap);

impl Bytes for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

struct Memory(Shared<u8>);

impl Bytes for Memory {
    fn bytes(&self) -> &[u8] {
        // SAFETY: nobody writes any more.
        #[expect(unsafe_code, reason = "packed weights lie in a shared buffer")]
        unsafe {
            self.0.get(0..self.0.len())
        }
    }
}
