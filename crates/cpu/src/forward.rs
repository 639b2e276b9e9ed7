//! The forward pass: how a team runs the plan's sections over the rows of one step.

use crate::attention::{Attention, Heads, Scratch, Span};
use crate::kv_cache::KvCache;
use crate::matrix::{Form, Input, Matrix, Product};
use crate::plan::{Buffer, MatrixId, Plan, ProductOp, RowOp, Section, Space, VectorId, Work};
use crate::row_ops::{FormsOf, Memory, RowsTask, Surroundings, Token};
use crate::runner::Options;
use crate::sample::Sampler;
use crate::shared::Shared;
use crate::simd::Isa;
use crate::team::Member;
use baton_engine::{Batch, Row, RunnerSpec};
use baton_model::Storage;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Every activation in f32.
    Exact,
    /// Activations in 8 bits, with a scale for every 32, where weights have 8 bits or fewer; in bf16 where they are bf16.
    Quantized,
}

impl Arithmetic {
    fn form(self, storage: Storage) -> Form {
        match (self, storage) {
            (Self::Exact, _) | (_, Storage::F32 | Storage::F16) => Form::F32,
            (_, Storage::BF16) => Form::Bf16,
            _ => Form::Q8,
        }
    }
}

/// All that stays the same while a step runs.
pub(crate) struct Forward {
    isa: Isa,
    arithmetic: Arithmetic,
    plan: Plan,
    widths: Vec<usize>,
    forms: Vec<FormsOf>,
    matrices: Vec<Matrix>,
    vectors: Vec<Vec<f32>>,
    memory: Memory,
    pub(crate) cache: KvCache,
    /// Query heads of each KV head.
    pub(crate) group: usize,
    samplers: Vec<Mutex<Sampler>>,
    scratches: Vec<Mutex<Scratch>>,
    pub(crate) drawn: Shared<u32>,
    /// Where the logits of the last step lie.
    logits: Option<Buffer>,
}

/// One step's small inputs. Reused.
#[derive(Default)]
pub(crate) struct Step {
    tokens: Vec<Token>,
    /// For each sequence that wants a token: the row of its last one, and where it stands in the batch.
    last: Vec<usize>,
    pub(crate) wanting: Vec<usize>,
    pub(crate) spans: Vec<Span>,
    pub(crate) attention: Attention,
}

impl Step {
    pub(crate) fn fill(&mut self, batch: &Batch, rows: Range<usize>, spec: &RunnerSpec) {
        self.tokens.clear();
        self.last.clear();
        self.wanting.clear();
        self.spans.clear();
        for i in rows {
            let row = &batch.rows[i];
            let first_row = self.tokens.len();
            self.put_tokens(batch, row, spec.layout.block_size);
            self.spans.push(Span {
                first_row,
                n_tokens: row.tokens.len(),
                start: row.start,
                blocks: row.blocks.clone(),
            });
            if row.sampling.is_some() {
                self.last.push(self.tokens.len() - 1);
                self.wanting.push(i);
            }
        }
    }

    fn put_tokens(&mut self, batch: &Batch, row: &Row, block_size: u32) {
        let blocks = &batch.blocks[row.blocks.clone()];
        for (position, &id) in (row.start..).zip(&batch.tokens[row.tokens.clone()]) {
            let position = u32::try_from(position).unwrap_or(u32::MAX);
            self.tokens.push(Token {
                id,
                position,
                block: blocks[(position / block_size) as usize].0,
                slot: position % block_size,
            });
        }
    }
}

/// The forms that each buffer's rows are wanted in.
fn forms(plan: &Plan, form: impl Fn(&ProductOp) -> Form) -> Vec<FormsOf> {
    let mut forms = vec![FormsOf::default(); plan.strides.len()];
    for section in &plan.sections {
        let (Work::Products { x, .. } | Work::Gated { x, .. }) = &section.work else {
            continue;
        };
        for product in section.work.products() {
            forms[x.0].add(form(product));
        }
    }
    forms
}

/// Rows that every member rather does for itself than meets the others.
const FEW: usize = 2;
/// Parts for each thread, so that a slow one holds the others up little.
pub(crate) const PARTS: usize = 4;

impl Forward {
    pub(crate) fn new(
        plan: Plan,
        (matrices, vectors): (Vec<Matrix>, Vec<Vec<f32>>),
        (cache, group): (KvCache, usize),
        options: &Options,
        threads: usize,
    ) -> Self {
        let arithmetic = options.arithmetic;
        let form = |product: &ProductOp| arithmetic.form(matrices[product.matrix.0].storage);
        let forms = forms(&plan, form);
        let logits = plan.sections.iter().find_map(|section| match section.work {
            Work::Sample { logits } => Some(logits),
            _ => None,
        });
        let rows = options.max_chunk + options.max_batch.max(FEW * threads);
        let last_rows = options.max_batch.max(FEW * threads);
        let widest = plan
            .matrices
            .iter()
            .map(|m| crate::matrix::padded(m.n_in))
            .max()
            .unwrap_or(0);
        let any = |wants: fn(&FormsOf) -> bool| {
            if forms.iter().any(wants) {
                rows * widest
            } else {
                0
            }
        };
        let memory = Memory {
            buffers: (0..plan.strides.len())
                .map(|b| {
                    // Only a few rows ever get logits.
                    let n = if logits == Some(Buffer(b)) {
                        last_rows
                    } else {
                        rows
                    };
                    Shared::zeroed(n * plan.strides[b])
                })
                .collect(),
            bf16: Shared::zeroed(any(|f| f.bf16)),
            q8: Shared::zeroed(any(|f| f.q8) / crate::rows::BLOCK),
            strides: plan.strides.clone(),
        };
        Self {
            isa: Isa::detect(),
            arithmetic,
            widths: plan.widths.clone(),
            plan,
            forms,
            matrices,
            vectors,
            memory,
            cache,
            group,
            scratches: (0..threads).map(|_| Mutex::default()).collect(),
            samplers: (0..threads).map(|_| Mutex::default()).collect(),
            drawn: Shared::zeroed(rows),
            logits,
        }
    }

    /// A step, as every member runs it.
    pub(crate) fn run(&self, member: &Member<'_>, batch: &Batch, step: &Step) {
        let around = Surroundings {
            isa: self.isa,
            memory: &self.memory,
            matrices: &self.matrices,
            vectors: &self.vectors,
            widths: &self.widths,
            forms: &self.forms,
            cache: &self.cache,
            tokens: &step.tokens,
            last: &step.last,
        };
        let mut scratch = Vec::new();
        let sections = &self.plan.sections;
        let n_rows = |section: &Section| match section.space {
            Space::Tokens => step.tokens.len(),
            Space::Last => step.last.len(),
        };
        let is_private =
            |i: usize| n_rows(&sections[i]) <= FEW && sections[i].is_private(sections.get(i + 1));
        let mut private: Option<&Section> = None;
        let mut places = 0..sections.len();
        while let Some(i) = places.next() {
            let section = &sections[i];
            let n = n_rows(section);
            if n == 0 {
                return;
            }
            match &section.work {
                Work::Rows(ops) if is_private(i) => {
                    self.rows(ops, 0..n, member.index * n, &around, &mut scratch);
                    private = Some(section);
                    continue;
                }
                Work::Rows(ops) => self.shared_rows(member, ops, n, &around, &mut scratch),
                Work::Products { x, list } => {
                    self.products(member, Rows::new(member, n, *x, private), list);
                }
                Work::Gated { x, pair } => {
                    self.gated(member, Rows::new(member, n, *x, private), pair);
                }
                Work::Attend { layer, q, out } => self.attend(member, step, *layer, [*q, *out]),
                Work::Sample { logits } => self.sample(member, batch, step, *logits),
            }
            private = None;
            // Few rows are no work for a team: one member does them while the others wait anyway.
            let few = sections.get(i + 1).and_then(|next| match &next.work {
                Work::Rows(ops) if n_rows(next) <= FEW && !is_private(i + 1) => {
                    places.next();
                    Some((ops, n_rows(next)))
                }
                _ => None,
            });
            if n <= FEW {
                self.look_ahead(member, &sections[i + 1..], n);
            }
            member.meet_after(|| {
                if let Some((ops, n)) = few {
                    self.rows(ops, 0..n, 0, &around, &mut scratch);
                }
            });
        }
    }

    fn rows(
        &self,
        ops: &[RowOp],
        rows: Range<usize>,
        shift: usize,
        around: &Surroundings<'_>,
        scratch: &mut Vec<[f32; 16]>,
    ) {
        self.isa.run(RowsTask {
            ops,
            rows,
            shift,
            around,
            scratch,
        });
    }

    fn shared_rows(
        &self,
        member: &Member<'_>,
        ops: &[RowOp],
        n_rows: usize,
        around: &Surroundings<'_>,
        scratch: &mut Vec<[f32; 16]>,
    ) {
        let parts = n_rows.min(member.team_len() * PARTS);
        member.share(parts, |i| {
            self.rows(ops, part(i, parts, n_rows), 0, around, scratch);
        });
    }

    fn products(&self, member: &Member<'_>, rows: Rows, list: &[ProductOp]) {
        let cut = Cut::new(self.n_tiles(list), member, rows.n);
        member.share(cut.parts, |i| {
            let wanted = cut.part(i);
            let mut before = 0;
            for product in list {
                let n = self.matrix(product.matrix).n_tiles();
                let tiles = wanted.start.clamp(before, before + n) - before
                    ..wanted.end.clamp(before, before + n) - before;
                before += n;
                if !tiles.is_empty() {
                    self.product(product, tiles, rows);
                }
            }
        });
    }

    fn gated(&self, member: &Member<'_>, rows: Rows, pair: &[ProductOp; 2]) {
        let n_tiles = self.n_tiles(&pair[..1]);
        let cut = Cut::new(n_tiles, member, rows.n);
        // What few rows make of a part stays at hand, and memory is read faster in one go.
        let together = if rows.n <= FEW { n_tiles } else { 1 };
        member.share(cut.parts, |i| {
            let mut left = cut.part(i);
            while !left.is_empty() {
                let tiles = left.start..left.end.min(left.start + together);
                left.start = tiles.end;
                for product in pair {
                    self.product(product, tiles.clone(), rows);
                }
            }
        });
    }

    fn product(&self, product: &ProductOp, tiles: Range<usize>, rows: Rows) {
        let matrix = self.matrix(product.matrix);
        Product {
            matrix,
            tiles,
            input: self.input(self.arithmetic.form(matrix.storage), rows),
            n_rows: rows.n,
            out: &self.memory.buffers[product.out.0],
            stride: self.memory.strides[product.out.0],
            column: 0,
            bias: product.bias.map(|VectorId(b)| self.vectors[b].as_slice()),
            then: product.then,
        }
        .run(self.isa);
    }

    #[expect(unsafe_code, reason = "rows are shared between threads")]
    fn input(&self, form: Form, rows: Rows) -> Input<'_> {
        let stride = self.memory.strides[rows.x.0];
        let range = |base: usize, each: usize| base * each..(base + rows.n) * each;
        // SAFETY: prepared rows and the rows they were made of are written before the meeting that precedes a product,
        // or by this member alone, and a product writes neither.
        unsafe {
            match form {
                Form::F32 => {
                    Input::F32(self.memory.buffers[rows.x.0].get(range(rows.plain, stride)))
                }
                Form::Bf16 => {
                    let pairs = self.memory.bf16.get(range(rows.prepared, stride));
                    Input::Bf16(bytemuck::cast_slice(pairs))
                }
                Form::Q8 => {
                    let blocks = stride / crate::rows::BLOCK;
                    Input::Q8(self.memory.q8.get(range(rows.prepared, blocks)))
                }
            }
        }
    }

    fn matrix(&self, id: MatrixId) -> &Matrix {
        &self.matrices[id.0]
    }

    fn n_tiles(&self, list: &[ProductOp]) -> usize {
        list.iter().map(|p| self.matrix(p.matrix).n_tiles()).sum()
    }

    /// Asks memory for what this member reads first of the products to come, so that it is under way while the members
    /// meet: where a stretch of weights begins, the processor does not know yet that there is one.
    fn look_ahead(&self, member: &Member<'_>, to_come: &[Section], n_rows: usize) {
        let Some(work) = to_come
            .iter()
            .map(|s| &s.work)
            .find(|w| !w.products().is_empty())
        else {
            return;
        };
        let list = match work {
            Work::Gated { pair, .. } => &pair[..1],
            other => other.products(),
        };
        let mut first = Cut::new(self.n_tiles(list), member, n_rows)
            .part(member.index)
            .start;
        for product in list {
            let matrix = self.matrix(product.matrix);
            if first < matrix.n_tiles() {
                return matrix.fetch(first);
            }
            first -= matrix.n_tiles();
        }
    }

    fn attend(&self, member: &Member<'_>, step: &Step, layer: usize, [q, out]: [Buffer; 2]) {
        let heads = Heads {
            q: &self.memory.buffers[q.0],
            q_stride: self.memory.strides[q.0],
            out: &self.memory.buffers[out.0],
            out_stride: self.memory.strides[out.0],
        };
        let attention = &step.attention;
        let mut scratch = lock(&self.scratches[member.index]);
        member.share(attention.n_parts(), |i| {
            attention.part(self.isa, (i, layer), &self.cache, &heads, &mut scratch);
        });
        if attention.n_merges() > 0 {
            member.meet();
            member.share(attention.n_merges(), |i| {
                attention.merge(i, &self.cache.shape, &heads);
            });
        }
    }

    fn sample(&self, member: &Member<'_>, batch: &Batch, step: &Step, logits: Buffer) {
        member.share(step.wanting.len(), |i| {
            let Some(sampling) = &batch.rows[step.wanting[i]].sampling else {
                return;
            };
            let last = step.tokens[step.last[i]];
            let mut sampler = lock(&self.samplers[member.index]);
            let stride = self.memory.strides[logits.0];
            let at = i * stride;
            // SAFETY: logits were written before the last meeting, and each token is one member's.
            #[expect(unsafe_code, reason = "rows are shared between threads")]
            let (logits, drawn) = unsafe {
                (
                    self.memory.buffers[logits.0].get(at..at + self.widths[logits.0]),
                    self.drawn.get_mut(i..i + 1),
                )
            };
            drawn[0] = sampler.draw(logits, sampling, last.position + 1);
        });
    }

    /// The logits of the last step's row.
    pub(crate) fn logits_of(&mut self, place: usize) -> &[f32] {
        let Some(Buffer(b)) = self.logits else {
            return &[];
        };
        let stride = self.memory.strides[b];
        &self.memory.buffers[b].all()[place * stride..][..stride]
    }
}

/// What is one member's own; never contended.
fn lock<T>(own: &Mutex<T>) -> MutexGuard<'_, T> {
    own.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The rows that a product reads.
#[derive(Clone, Copy)]
struct Rows {
    x: Buffer,
    n: usize,
    /// Where the f32 rows begin.
    plain: usize,
    /// Where the prepared rows begin.
    prepared: usize,
}

impl Rows {
    /// As the section before left them: for all, or for this member alone.
    fn new(member: &Member<'_>, n: usize, x: Buffer, private: Option<&Section>) -> Self {
        let own = |is_own: bool| if is_own { member.index * n } else { 0 };
        Self {
            x,
            n,
            plain: own(private.is_some_and(|section| section.makes(x))),
            prepared: own(private.is_some()),
        }
    }
}

/// How the tiles of products are shared out.
#[derive(Clone, Copy)]
struct Cut {
    n_tiles: usize,
    parts: usize,
    /// The first part of each member is so many times as long as the others.
    long: usize,
    members: usize,
}

impl Cut {
    fn new(n_tiles: usize, member: &Member<'_>, n_rows: usize) -> Self {
        let members = member.team_len();
        Self {
            n_tiles,
            parts: n_tiles.min(members * PARTS),
            // With few rows the time goes into reading: one long stretch for each, and short ones so that all end together.
            long: if n_rows <= FEW { 5 } else { 1 },
            members,
        }
    }

    fn part(&self, i: usize) -> Range<usize> {
        let lengths = |parts: usize| parts + parts.min(self.members) * (self.long - 1);
        let end = |parts: usize| lengths(parts) * self.n_tiles / lengths(self.parts);
        end(i)..end(i + 1)
    }
}

/// Part `i` of `parts` of `0..n`.
fn part(i: usize, parts: usize, n: usize) -> Range<usize> {
    i * n / parts..(i + 1) * n / parts
}
