internal import Foundation

/// Rows under headings, aligned: the first column left, numbers right.
package struct TextTable: Sendable {
  package var headings: [String]
  package var rows: [[String]] = []

  package init(_ headings: [String]) { self.headings = headings }

  package var text: String {
    let all = [headings] + rows
    let widths = headings.indices.map { column in all.map { $0[column].count }.max() ?? 0 }
    func line(_ cells: [String]) -> String {
      cells.enumerated().map { column, cell in
        let space = String(repeating: " ", count: widths[column] - cell.count)
        return column == 0 ? cell + space : space + cell
      }.joined(separator: "  ")
    }
    let rule = widths.map { String(repeating: "-", count: $0) }.joined(separator: "  ")
    return ([line(headings), rule] + rows.map(line)).joined(separator: "\n")
  }
}

/// Numbers for people.
package enum Print {
  package static func fixed(_ value: Double, _ digits: Int) -> String {
    value.isFinite ? String(format: "%.\(digits)f", value) : "–"
  }

  package static func significant(_ value: Double) -> String {
    value.isFinite ? String(format: "%.3g", value) : "–"
  }

  package static func percent(_ share: Double, digits: Int = 1, sign: Bool = false) -> String {
    share.isFinite ? String(format: sign ? "%+.\(digits)f%%" : "%.\(digits)f%%", share * 100) : "–"
  }

  /// 1024-based, such as `1.5 MiB`.
  package static func bytes(_ count: Int) -> String {
    var value = Double(count)
    for unit in ["B", "KiB", "MiB"] {
      if value < 1024 { return (unit == "B" ? String(count) : fixed(value, 1)) + " " + unit }
      value /= 1024
    }
    return fixed(value, 2) + " GiB"
  }
}

/// Seconds of a duration.
extension Duration {
  package var seconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}
