//! The report as one HTML file, which needs no network: a page around the same document as the JSON.

/// The page; `json` is the report.
#[must_use]
pub fn html(json: &str) -> String {
    // Nothing in a string may end the element that holds it.
    include_str!("page.html").replacen("REPORT", &json.replace('<', "\\u003c"), 1)
}
