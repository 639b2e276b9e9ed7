//! Operations that move elements: broadcasts, slices, gathers, scatters.

use super::{Body, Element, Type, Value, join};

/// How a gather reads slices of its operand.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// Where the slice's dimensions that are kept stand in the result.
    pub offset_dims: &'a [usize],
    /// Dimensions of the slice that vanish; their size is 1.
    pub collapsed: &'a [usize],
    /// The operand dimensions that an index vector's components select.
    pub index_map: &'a [usize],
    /// Size of the slice in every operand dimension.
    pub slice: &'a [usize],
}

/// How a scatter overwrites slices of its operand. Indices must be distinct; those out of bounds are skipped.
#[derive(Clone, Copy, Debug)]
pub struct Scatter<'a> {
    /// Dimensions of the updates that lie inside a slice.
    pub window_dims: &'a [usize],
    /// Operand dimensions in which a slice has size 1 and that the updates lack.
    pub inserted: &'a [usize],
    /// The operand dimensions that an index vector's components select.
    pub index_map: &'a [usize],
}

impl Body {
    /// Repeats `x`, whose dimensions become `dims` of the result.
    pub fn broadcast(&mut self, x: &Value, to: &[usize], dims: &[usize]) -> Value {
        let fits = x.ty.dims.len() == dims.len()
            && x.ty
                .dims
                .iter()
                .zip(dims)
                .all(|(&size, &d)| to.get(d).is_some_and(|&t| size == t || size == 1));
        let ty = Type::new(x.ty.element, to);
        if !fits {
            self.refuse("broadcast_in_dim", format!("{} to {ty} by {dims:?}", x.ty));
        }
        if x.ty == ty {
            return x.clone();
        }
        let map = join(dims);
        self.emit(
            ty.clone(),
            format_args!(
                "stablehlo.broadcast_in_dim {x}, dims = [{map}] : ({}) -> {ty}",
                x.ty
            ),
        )
    }

    /// Gives a scalar the shape of `like`.
    pub fn splat(&mut self, x: &Value, like: &Value) -> Value {
        let dims = like.ty.dims.clone();
        self.broadcast(x, &dims, &[])
    }

    /// Repeats `x` over the trailing dimensions that `to` has more.
    pub fn extend(&mut self, x: &Value, to: &[usize]) -> Value {
        let dims: Vec<usize> = (0..x.ty.dims.len()).collect();
        self.broadcast(x, to, &dims)
    }

    /// The same elements in another shape.
    pub fn reshape(&mut self, x: &Value, to: &[usize]) -> Value {
        let ty = Type::new(x.ty.element, to);
        if x.ty.count() != ty.count() {
            self.refuse("reshape", format!("{} to {ty}", x.ty));
        }
        if x.ty == ty {
            return x.clone();
        }
        self.emit(
            ty.clone(),
            format_args!("stablehlo.reshape {x} : ({}) -> {ty}", x.ty),
        )
    }

    /// Dimension `i` of the result is dimension `order[i]` of `x`.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Value {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..x.ty.dims.len()) {
            self.refuse("transpose", format!("{} by {order:?}", x.ty));
            return x.clone();
        }
        let dims = order.iter().map(|&d| x.ty.dims[d]).collect();
        let ty = Type {
            element: x.ty.element,
            dims,
        };
        let by = join(order);
        self.emit(
            ty.clone(),
            format_args!(
                "stablehlo.transpose {x}, dims = [{by}] : ({}) -> {ty}",
                x.ty
            ),
        )
    }

    /// Elements `from..to` along one dimension.
    pub fn slice(&mut self, x: &Value, dim: usize, range: std::ops::Range<usize>) -> Value {
        let mut ty = x.ty.clone();
        match ty.dims.get_mut(dim) {
            Some(size) if range.end <= *size && range.start <= range.end => *size = range.len(),
            _ => self.refuse("slice", format!("{range:?} of dimension {dim} of {}", x.ty)),
        }
        let ranges = join(
            x.ty.dims
                .iter()
                .enumerate()
                .map(|(d, &size)| match d == dim {
                    true => format!("{}:{}", range.start, range.end),
                    false => format!("0:{size}"),
                }),
        );
        self.emit(
            ty.clone(),
            format_args!("stablehlo.slice {x} [{ranges}] : ({}) -> {ty}", x.ty),
        )
    }

    /// A slice of size `sizes` that begins at scalar `starts`, moved inwards if it would stick out.
    pub fn dynamic_slice(&mut self, x: &Value, starts: &[&Value], sizes: &[usize]) -> Value {
        let ty = Type::new(x.ty.element, sizes);
        let scalar = Type::new(Element::I32, &[]);
        let fits = starts.len() == x.ty.dims.len()
            && sizes.len() == starts.len()
            && starts.iter().all(|s| s.ty == scalar)
            && sizes.iter().zip(&x.ty.dims).all(|(s, d)| s <= d);
        if !fits {
            self.refuse("dynamic_slice", format!("{sizes:?} of {}", x.ty));
        }
        let (at, sizes) = (join(starts), join(sizes));
        let types = join(std::iter::once(&x.ty).chain(starts.iter().map(|s| &s.ty)));
        self.emit(
            ty.clone(),
            format_args!(
                "stablehlo.dynamic_slice {x}, {at}, sizes = [{sizes}] : ({types}) -> {ty}"
            ),
        )
    }

    /// Values one behind another along a dimension; at least one.
    pub fn concatenate(&mut self, parts: &[Value], dim: usize) -> Value {
        let mut ty = parts[0].ty.clone();
        let like = |v: &Value| {
            let mut t = v.ty.clone();
            t.dims
                .get_mut(dim)
                .map(|d| std::mem::replace(d, 0))
                .map(|size| (t, size))
        };
        let shapes: Option<Vec<_>> = parts.iter().map(like).collect();
        match shapes {
            Some(s) if s.iter().all(|(t, _)| *t == s[0].0) => {
                ty.dims[dim] = s.iter().map(|(_, size)| size).sum();
            }
            _ => self.refuse(
                "concatenate",
                format!("{} along {dim}", join(parts.iter().map(|p| &p.ty))),
            ),
        }
        let (values, types) = (join(parts), join(parts.iter().map(|p| &p.ty)));
        self.emit(
            ty.clone(),
            format_args!("stablehlo.concatenate {values}, dim = {dim} : ({types}) -> {ty}"),
        )
    }

    /// Reads slices of `x` at index vectors, which are the last dimension of `at`.
    pub fn gather(&mut self, x: &Value, at: &Value, how: Gather<'_>) -> Value {
        let rank = x.ty.dims.len();
        let vector = at.ty.dims.len().saturating_sub(1);
        let fits = how.slice.len() == rank
            && how.slice.iter().zip(&x.ty.dims).all(|(s, d)| s <= d)
            && how.offset_dims.len() + how.collapsed.len() == rank
            && at.ty.dims.last() == Some(&how.index_map.len());
        if !fits {
            self.refuse("gather", format!("{} at {} by {how:?}", x.ty, at.ty));
        }
        let kept = how
            .slice
            .iter()
            .enumerate()
            .filter(|(d, _)| !how.collapsed.contains(d))
            .map(|(_, &s)| s);
        let mut kept = kept.into_iter();
        let mut batch = at.ty.dims.iter().take(vector).copied();
        let dims = (0..vector + how.offset_dims.len())
            .map(|d| {
                if how.offset_dims.contains(&d) {
                    kept.next()
                } else {
                    batch.next()
                }
                .unwrap_or(0)
            })
            .collect();
        let ty = Type {
            element: x.ty.element,
            dims,
        };
        let (offset, collapsed) = (join(how.offset_dims), join(how.collapsed));
        let (map, slice) = (join(how.index_map), join(how.slice));
        self.emit(
            ty.clone(),
            format_args!(
                "\"stablehlo.gather\"({x}, {at}) <{{dimension_numbers = #stablehlo.gather<offset_dims = [{offset}], \
                 collapsed_slice_dims = [{collapsed}], start_index_map = [{map}], index_vector_dim = {vector}>, \
                 indices_are_sorted = false, slice_sizes = array<i64: {slice}>}}> : ({}, {}) -> {ty}",
                x.ty, at.ty
            ),
        )
    }

    /// `x` with slices overwritten at index vectors, which are the last dimension of `at`.
    pub fn scatter(&mut self, x: &Value, at: &Value, updates: &Value, how: Scatter<'_>) -> Value {
        let vector = at.ty.dims.len().saturating_sub(1);
        let fits = x.ty.element == updates.ty.element
            && how.window_dims.len() + how.inserted.len() == x.ty.dims.len()
            && updates.ty.dims.len() == vector + how.window_dims.len()
            && at.ty.dims.last() == Some(&how.index_map.len());
        if !fits {
            self.refuse(
                "scatter",
                format!("{} into {} at {} by {how:?}", updates.ty, x.ty, at.ty),
            );
        }
        let scalar = Type::new(x.ty.element, &[]);
        let (window, inserted, map) = (
            join(how.window_dims),
            join(how.inserted),
            join(how.index_map),
        );
        let (old, new) = (self.fresh(), self.fresh());
        self.emit(
            x.ty.clone(),
            format_args!(
                "\"stablehlo.scatter\"({x}, {at}, {updates}) <{{scatter_dimension_numbers = #stablehlo.scatter<\
                 update_window_dims = [{window}], inserted_window_dims = [{inserted}], scatter_dims_to_operand_dims = [{map}], \
                 index_vector_dim = {vector}>, indices_are_sorted = false, unique_indices = true}}> ({{\n    \
                 ^bb0(%{old}: {scalar}, %{new}: {scalar}):\n      stablehlo.return %{new} : {scalar}\n    }}) : \
                 ({}, {}, {}) -> {}",
                x.ty, at.ty, updates.ty, x.ty
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hlo::Module;

    #[test]
    fn a_gather_puts_slices_where_it_is_told() {
        let mut m = Module::new("g");
        let pool = m.arg(Type::new(Element::F32, &[9, 2, 3, 16, 8]), None);
        let at = m.arg(Type::new(Element::I32, &[4, 5, 1]), None);
        let how = Gather {
            offset_dims: &[1, 2, 4, 5],
            collapsed: &[0],
            index_map: &[0],
            slice: &[1, 2, 3, 16, 8],
        };
        let pages = m.body().gather(&pool, &at, how);
        assert_eq!(pages.dims(), [4, 2, 3, 5, 16, 8]);
        assert!(m.finish(&[pages]).is_ok());
    }

    #[test]
    fn a_slice_past_the_end_is_refused() {
        let mut m = Module::new("s");
        let x = m.arg(Type::new(Element::F32, &[4]), None);
        let y = m.body().slice(&x, 0, 2..5);
        assert_eq!(m.finish(&[y]).unwrap_err().op, "slice");
    }

    #[test]
    fn broadcasting_to_an_unequal_size_is_refused() {
        let mut m = Module::new("b");
        let x = m.arg(Type::new(Element::F32, &[4]), None);
        let y = m.body().broadcast(&x, &[3, 5], &[1]);
        assert_eq!(m.finish(&[y]).unwrap_err().op, "broadcast_in_dim");
    }
}
