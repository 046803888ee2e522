# For a tap of one's own: fill in where an archive of the source is, and its checksum.
class MlxServer < Formula
  desc "Inference server for MLX language models"
  homepage "URL-OF-THE-PROJECT"
  url "URL-OF-THE-ARCHIVE"
  sha256 "SHA256-OF-THE-ARCHIVE"
  license "Apache-2.0"

  depends_on "python@3.13"

  on_macos do
    depends_on arch: :arm64
    depends_on macos: :sonoma
  end

  def install
    python = Formula["python@3.13"].opt_bin/"python3.13"
    system python, "-m", "venv", libexec
    # On Linux the device is a choice: see the table in README.md.
    target = OS.mac? ? buildpath : "#{buildpath}[cpu]"
    system libexec/"bin/pip", "install", "--constraint", "constraints.txt", target
    bin.install_symlink libexec/"bin/mlx-server"
    generate_completions_from_executable(bin/"mlx-server", "completion")
  end

  service do
    run [opt_bin/"mlx-server", "serve", "--log-file", var/"log/mlx-server/server.log"]
    keep_alive successful_exit: false
    process_type :interactive
    error_log_path var/"log/mlx-server/console.log"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/mlx-server --version")
  end
end
