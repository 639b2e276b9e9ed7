//! Elementwise operations, constants, reductions and dot products.

use super::{Body, Element, Type, Value, join};

/// Which way a comparison goes.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Equal.
    Eq,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

/// Which dimensions of a dot product's operands pair up: `(left, right)`.
#[derive(Clone, Copy, Debug)]
pub struct Dot<'a> {
    /// Kept in pairs, leading in the result.
    pub batch: (&'a [usize], &'a [usize]),
    /// Summed over.
    pub contract: (&'a [usize], &'a [usize]),
}

macro_rules! unary {
    ($($(#[$doc:meta])* $method:ident => $op:literal;)*) => {$(
        $(#[$doc])*
        pub fn $method(&mut self, x: &Value) -> Value {
            self.emit(x.ty.clone(), format_args!(concat!("stablehlo.", $op, " {} : {}"), x, x.ty))
        }
    )*};
}

macro_rules! binary {
    ($($(#[$doc:meta])* $method:ident => $op:literal;)*) => {$(
        $(#[$doc])*
        pub fn $method(&mut self, a: &Value, b: &Value) -> Value {
            self.same($op, a, b);
            self.emit(a.ty.clone(), format_args!(concat!("stablehlo.", $op, " {}, {} : {}"), a, b, a.ty))
        }
    )*};
}

impl Body {
    unary! {
        /// e to the power of x.
        exp => "exponential";
        /// Natural logarithm.
        log => "log";
        /// ln(1 + x).
        log_plus_one => "log_plus_one";
        /// -x.
        neg => "negate";
        /// Bitwise or logical complement.
        not => "not";
        /// 1 / sqrt(x).
        rsqrt => "rsqrt";
        /// Cosine.
        cos => "cosine";
        /// Sine.
        sin => "sine";
        /// 1 / (1 + e^-x).
        logistic => "logistic";
    }

    binary! {
        /// a + b.
        add => "add";
        /// a - b.
        sub => "subtract";
        /// a * b.
        mul => "multiply";
        /// a / b; integers round towards zero.
        div => "divide";
        /// a mod b with the sign of a.
        rem => "remainder";
        /// The greater.
        max => "maximum";
        /// The smaller.
        min => "minimum";
        /// Bitwise or logical and.
        and => "and";
        /// Bitwise or logical or.
        or => "or";
        /// Bitwise exclusive or.
        xor => "xor";
        /// a shifted left by b bits.
        shl => "shift_left";
        /// a shifted right by b bits, zeros coming in.
        shr => "shift_right_logical";
    }

    pub(super) fn same(&mut self, op: &'static str, a: &Value, b: &Value) {
        if a.ty != b.ty {
            self.refuse(op, format!("{} and {}", a.ty, b.ty));
        }
    }

    /// A float constant in every element.
    pub fn float(&mut self, value: f32, like: &Type) -> Value {
        if !like.element.is_float() {
            self.refuse("constant", format!("a float in {like}"));
        }
        let literal = float_literal(value, like.element);
        self.emit(
            like.clone(),
            format_args!("stablehlo.constant dense<{literal}> : {like}"),
        )
    }

    /// An integer constant in every element.
    pub fn int(&mut self, value: i64, like: &Type) -> Value {
        if !matches!(like.element, Element::I32 | Element::U32) {
            self.refuse("constant", format!("an integer in {like}"));
        }
        self.emit(
            like.clone(),
            format_args!("stablehlo.constant dense<{value}> : {like}"),
        )
    }

    /// A vector of f32 constants, written bit for bit.
    pub fn floats(&mut self, values: &[f32]) -> Value {
        let ty = Type::new(Element::F32, &[values.len()]);
        let mut bits = String::from("\"0x");
        for byte in values.iter().flat_map(|v| v.to_le_bytes()) {
            bits.push_str(&format!("{byte:02X}"));
        }
        self.emit(
            ty.clone(),
            format_args!("stablehlo.constant dense<{bits}\"> : {ty}"),
        )
    }

    /// 0, 1, 2… along one dimension.
    pub fn iota(&mut self, ty: &Type, dim: usize) -> Value {
        if dim >= ty.dims.len() {
            self.refuse("iota", format!("dimension {dim} of {ty}"));
        }
        self.emit(
            ty.clone(),
            format_args!("stablehlo.iota dim = {dim} : {ty}"),
        )
    }

    /// The same numbers in another element type.
    pub fn convert(&mut self, x: &Value, to: Element) -> Value {
        if x.ty.element == to {
            return x.clone();
        }
        let ty = x.ty.with(to);
        self.emit(
            ty.clone(),
            format_args!("stablehlo.convert {x} : ({}) -> {ty}", x.ty),
        )
    }

    /// The same bits as another element type of the same width.
    pub fn bitcast(&mut self, x: &Value, to: Element) -> Value {
        if x.ty.element == to {
            return x.clone();
        }
        let ty = x.ty.with(to);
        if x.ty.element.bytes() != to.bytes() {
            self.refuse("bitcast_convert", format!("{} to {ty}", x.ty));
        }
        self.emit(
            ty.clone(),
            format_args!("stablehlo.bitcast_convert {x} : ({}) -> {ty}", x.ty),
        )
    }

    /// Elementwise comparison.
    pub fn compare(&mut self, order: Order, a: &Value, b: &Value) -> Value {
        self.same("compare", a, b);
        let direction = match order {
            Order::Eq => "EQ",
            Order::Lt => "LT",
            Order::Le => "LE",
            Order::Gt => "GT",
            Order::Ge => "GE",
        };
        let kind = match a.ty.element {
            Element::U32 | Element::I1 => "UNSIGNED",
            Element::I32 => "SIGNED",
            _ => "FLOAT",
        };
        let ty = a.ty.with(Element::I1);
        let operands = format!("({}, {})", a.ty, b.ty);
        self.emit(
            ty.clone(),
            format_args!("stablehlo.compare {direction}, {a}, {b}, {kind} : {operands} -> {ty}"),
        )
    }

    /// `yes` where the predicate holds, else `no`.
    pub fn select(&mut self, pred: &Value, yes: &Value, no: &Value) -> Value {
        self.same("select", yes, no);
        if pred.ty != yes.ty.with(Element::I1) {
            self.refuse("select", format!("{} chooses among {}", pred.ty, yes.ty));
        }
        self.emit(
            yes.ty.clone(),
            format_args!(
                "stablehlo.select {pred}, {yes}, {no} : {}, {}",
                pred.ty, yes.ty
            ),
        )
    }

    /// Sum over dimensions.
    pub fn reduce_sum(&mut self, x: &Value, dims: &[usize]) -> Value {
        let scalar = Type::new(x.ty.element, &[]);
        let zero = if x.ty.element.is_float() {
            self.float(0.0, &scalar)
        } else {
            self.int(0, &scalar)
        };
        self.reduce("add", x, &zero, dims)
    }

    /// Maximum over dimensions; of nothing, the least value.
    pub fn reduce_max(&mut self, x: &Value, dims: &[usize]) -> Value {
        let scalar = Type::new(x.ty.element, &[]);
        let least = match x.ty.element {
            Element::I32 => self.int(i64::from(i32::MIN), &scalar),
            Element::U32 => self.int(0, &scalar),
            _ => self.float(f32::NEG_INFINITY, &scalar),
        };
        self.reduce("maximum", x, &least, dims)
    }

    /// Minimum of `i32`s over dimensions; of nothing, the greatest value.
    pub fn reduce_min(&mut self, x: &Value, dims: &[usize]) -> Value {
        let greatest = self.int(i64::from(i32::MAX), &Type::new(Element::I32, &[]));
        self.reduce("minimum", x, &greatest, dims)
    }

    fn reduce(&mut self, op: &'static str, x: &Value, init: &Value, dims: &[usize]) -> Value {
        if x.ty.element != init.ty.element || dims.iter().any(|&d| d >= x.ty.dims.len()) {
            self.refuse(
                op,
                format!("reduce {} from {} over {dims:?}", x.ty, init.ty),
            );
        }
        let kept =
            x.ty.dims
                .iter()
                .enumerate()
                .filter(|(i, _)| !dims.contains(i))
                .map(|(_, &d)| d);
        let ty = Type {
            element: x.ty.element,
            dims: kept.collect(),
        };
        let over = join(dims);
        self.emit(
            ty.clone(),
            format_args!(
                "stablehlo.reduce({x} init: {init}) applies stablehlo.{op} across dimensions = [{over}] : ({}, {}) -> {ty}",
                x.ty, init.ty
            ),
        )
    }

    /// Dot product into f32, whatever the operands' width. f32 operands say HIGHEST, because a GPU's default for
    /// them keeps ten bits of mantissa only.
    pub fn dot(&mut self, a: &Value, b: &Value, pairs: Dot<'_>) -> Value {
        let picked = |v: &Value, dims: &[usize]| -> Option<Vec<usize>> {
            dims.iter().map(|&d| v.ty.dims.get(d).copied()).collect()
        };
        let batch = picked(a, pairs.batch.0);
        let agree = batch == picked(b, pairs.batch.1)
            && picked(a, pairs.contract.0) == picked(b, pairs.contract.1);
        if !agree || a.ty.element != b.ty.element || !a.ty.element.is_float() {
            self.refuse("dot_general", format!("{} and {} by {pairs:?}", a.ty, b.ty));
        }
        let free = |v: &Value, batch: &[usize], contract: &[usize]| -> Vec<usize> {
            let used = |i: &usize| batch.contains(i) || contract.contains(i);
            (0..v.ty.dims.len())
                .filter(|i| !used(i))
                .map(|i| v.ty.dims[i])
                .collect()
        };
        let mut dims = batch.unwrap_or_default();
        dims.extend(free(a, pairs.batch.0, pairs.contract.0));
        dims.extend(free(b, pairs.batch.1, pairs.contract.1));
        let ty = Type {
            element: Element::F32,
            dims,
        };
        let precision = if a.ty.element == Element::F32 {
            "HIGHEST"
        } else {
            "DEFAULT"
        };
        let (ab, bb) = (join(pairs.batch.0), join(pairs.batch.1));
        let (ac, bc) = (join(pairs.contract.0), join(pairs.contract.1));
        let batching = if ab.is_empty() {
            String::new()
        } else {
            format!("batching_dims = [{ab}] x [{bb}], ")
        };
        self.emit(
            ty.clone(),
            format_args!(
                "stablehlo.dot_general {a}, {b}, {batching}contracting_dims = [{ac}] x [{bc}], \
                 precision = [{precision}, {precision}] : ({}, {}) -> {ty}",
                a.ty, b.ty
            ),
        )
    }
}

/// MLIR wants a point before an exponent, and bits for what has no decimal form.
fn float_literal(value: f32, element: Element) -> String {
    if !value.is_finite() {
        return match element {
            Element::BF16 => format!("0x{:04X}", value.to_bits() >> 16),
            Element::F16 if value > 0.0 => "0x7C00".to_owned(),
            Element::F16 if value < 0.0 => "0xFC00".to_owned(),
            Element::F16 => "0x7E00".to_owned(),
            // No infinity: the greatest number stands for it.
            Element::F8E4M3FN if value > 0.0 => "0x7E".to_owned(),
            Element::F8E4M3FN if value < 0.0 => "0xFE".to_owned(),
            Element::F8E4M3FN => "0x7F".to_owned(),
            _ => format!("0x{:08X}", value.to_bits()),
        };
    }
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((mantissa, exponent)) if !mantissa.contains('.') => format!("{mantissa}.0e{exponent}"),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hlo::Module;

    #[test]
    fn float_literals_are_ones_that_mlir_reads() {
        let literal = |v| float_literal(v, Element::F32);
        assert_eq!(literal(1.0), "1.0");
        assert_eq!(literal(1e-5), "1.0e-5");
        assert_eq!(literal(1.5e-7), "1.5e-7");
        assert_eq!(literal(f32::NEG_INFINITY), "0xFF800000");
        assert_eq!(float_literal(f32::NEG_INFINITY, Element::BF16), "0xFF80");
    }

    #[test]
    fn a_dot_has_batch_then_left_then_right_dimensions() {
        let mut m = Module::new("dot");
        let a = m.arg(Type::new(Element::BF16, &[2, 5, 7]), None);
        let b = m.arg(Type::new(Element::BF16, &[2, 3, 7]), None);
        let c = m.body().dot(
            &a,
            &b,
            Dot {
                batch: (&[0], &[0]),
                contract: (&[2], &[2]),
            },
        );
        assert_eq!(c.ty(), &Type::new(Element::F32, &[2, 5, 3]));
        assert!(
            m.finish(&[c])
                .unwrap()
                .contains("batching_dims = [0] x [0], contracting_dims = [2] x [2]")
        );
    }

    #[test]
    fn a_dot_over_unequal_dimensions_is_refused() {
        let mut m = Module::new("dot");
        let a = m.arg(Type::new(Element::F32, &[5, 7]), None);
        let b = m.arg(Type::new(Element::F32, &[3, 8]), None);
        let c = m.body().dot(
            &a,
            &b,
            Dot {
                batch: (&[], &[]),
                contract: (&[1], &[1]),
            },
        );
        assert_eq!(m.finish(&[c]).unwrap_err().op, "dot_general");
    }
}
