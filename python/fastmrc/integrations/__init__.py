"""fastmrc under the interfaces of other libraries."""
