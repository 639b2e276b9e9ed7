//! A small typed writer of StableHLO text: values carry their types, operations check them.
//!
//! It knows the operations that lowerings use and nothing of models. It is no MLIR library: no parsing, no passes.
//! Invariant: text is handed out only if every operation type-checked; the first mistake is kept and returned by
//! [`Module::finish`], so that lowerings read as straight lines.

mod indexing;
mod math;
mod region;

pub use indexing::{Gather, Scatter};
pub use math::{Dot, Order};

use std::fmt::{self, Write as _};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half.
    F16,
    /// Eight bits, four of them exponent; no infinity.
    F8E4M3FN,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Boolean.
    I1,
}

impl Element {
    /// StableHLO's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::BF16 => "bf16",
            Self::F16 => "f16",
            Self::F8E4M3FN => "f8E4M3FN",
            Self::I32 => "i32",
            Self::U32 => "ui32",
            Self::I1 => "i1",
        }
    }

    /// Bytes of one element in host memory.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::F8E4M3FN | Self::I1 => 1,
        }
    }

    pub(crate) const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::BF16 | Self::F16 | Self::F8E4M3FN)
    }
}

/// Type of a tensor. No dimensions: a scalar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    /// Of each element.
    pub element: Element,
    /// Sizes, the slowest first.
    pub dims: Vec<usize>,
}

impl Type {
    /// A tensor type.
    pub fn new(element: Element, dims: &[usize]) -> Self {
        Self {
            element,
            dims: dims.to_vec(),
        }
    }

    /// The same shape with other elements.
    #[must_use]
    pub fn with(&self, element: Element) -> Self {
        Self {
            element,
            dims: self.dims.clone(),
        }
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.dims.iter().product()
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tensor<")?;
        for d in &self.dims {
            write!(f, "{d}x")?;
        }
        write!(f, "{}>", self.element.name())
    }
}

/// An SSA value.
#[derive(Clone, Debug)]
pub struct Value {
    name: String,
    ty: Type,
}

impl Value {
    /// Its type.
    pub fn ty(&self) -> &Type {
        &self.ty
    }

    /// Its sizes, the slowest first.
    pub fn dims(&self) -> &[usize] {
        &self.ty.dims
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.name)
    }
}

/// An operation whose operands do not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {detail}")]
pub struct HloError {
    /// The operation.
    pub op: &'static str,
    /// What does not fit.
    pub detail: String,
}

/// One `func.func @main` under construction.
#[derive(Debug)]
pub struct Module {
    name: String,
    args: Vec<(Value, Option<usize>)>,
    body: Body,
}

impl Module {
    /// An empty module.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            args: Vec::new(),
            body: Body::default(),
        }
    }

    /// Adds an argument; with `donated_to`, its buffer becomes that result's.
    pub fn arg(&mut self, ty: Type, donated_to: Option<usize>) -> Value {
        let value = Value {
            name: format!("arg{}", self.args.len()),
            ty,
        };
        self.args.push((value.clone(), donated_to));
        value
    }

    /// Where operations are written.
    pub fn body(&mut self) -> &mut Body {
        &mut self.body
    }

    /// The module's text.
    ///
    /// # Errors
    /// The first operation that did not type-check, or a donated argument whose result has another type.
    pub fn finish(mut self, results: &[Value]) -> Result<String, HloError> {
        for (arg, to) in &self.args {
            let Some(to) = *to else { continue };
            if results.get(to).map(Value::ty) != Some(arg.ty()) {
                self.body
                    .refuse("donate", format!("{arg} {} to result {to}", arg.ty));
            }
        }
        if let Some(error) = self.body.error.take() {
            return Err(error);
        }
        let args = join(self.args.iter().map(|(v, to)| match to {
            Some(to) => format!("{v}: {} {{tf.aliasing_output = {to} : i32}}", v.ty),
            None => format!("{v}: {}", v.ty),
        }));
        let types = join(results.iter().map(|r| &r.ty));
        let (name, body) = (&self.name, &self.body.text);
        Ok(format!(
            "module @{name} {{\n  func.func public @main({args}) -> ({types}) {{\n{body}    return {} : {types}\n  }}\n}}\n",
            join(results),
        ))
    }
}

/// A sequence of operations: the function's body, or a region's.
#[derive(Debug, Default)]
pub struct Body {
    text: String,
    next: u32,
    depth: usize,
    error: Option<HloError>,
}

impl Body {
    /// Records a mistake, unless there was one before.
    pub fn refuse(&mut self, op: &'static str, detail: String) {
        self.error.get_or_insert(HloError { op, detail });
    }

    /// Writes an operation that this builder does not know, such as a `custom_call` to a kernel. `rest` is all that
    /// follows the equals sign.
    pub fn raw(&mut self, ty: Type, rest: impl fmt::Display) -> Value {
        self.emit(ty, format_args!("{rest}"))
    }

    fn fresh(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        let indent = 4 + 2 * self.depth;
        writeln!(self.text, "{:indent$}{line}", "").expect("a string takes any text");
    }

    fn emit(&mut self, ty: Type, rest: fmt::Arguments<'_>) -> Value {
        let value = Value {
            name: self.fresh().to_string(),
            ty,
        };
        self.line(format_args!("{value} = {rest}"));
        value
    }
}

fn join<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut out = String::new();
    for item in items {
        let comma = if out.is_empty() { "" } else { ", " };
        write!(out, "{comma}{item}").expect("a string takes any text");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_reads_as_stablehlo() {
        let mut m = Module::new("twice");
        let x = m.arg(Type::new(Element::F32, &[2, 3]), Some(0));
        let y = m.body().add(&x, &x);
        let text = m.finish(&[y]).unwrap();
        assert_eq!(
            text,
            "module @twice {\n  func.func public @main(%arg0: tensor<2x3xf32> {tf.aliasing_output = 0 : i32}) \
             -> (tensor<2x3xf32>) {\n    %1 = stablehlo.add %arg0, %arg0 : tensor<2x3xf32>\n    return %1 : \
             tensor<2x3xf32>\n  }\n}\n"
        );
    }

    #[test]
    fn operands_of_different_types_are_refused() {
        let mut m = Module::new("bad");
        let x = m.arg(Type::new(Element::F32, &[2]), None);
        let y = m.arg(Type::new(Element::I32, &[2]), None);
        let z = m.body().add(&x, &y);
        let error = m.finish(&[z]).unwrap_err();
        assert_eq!(error.to_string(), "add: tensor<2xf32> and tensor<2xi32>");
    }

    #[test]
    fn a_donated_argument_must_have_its_results_type() {
        let mut m = Module::new("bad");
        let x = m.arg(Type::new(Element::F32, &[2]), Some(0));
        let y = m.body().convert(&x, Element::BF16);
        assert_eq!(m.finish(&[y]).unwrap_err().op, "donate");
    }
}
